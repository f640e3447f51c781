"""One run at a time in an output folder: a lock that says who holds it, and is taken over from those that are gone.

The main rank makes `run.lock` before anything else in the folder is read or written, touches it every minute, and removes it on
its way out, also after an error. A second run in the same folder is refused. A lock that was left behind is taken over, when

1. it is of this machine, and no process has its number and start time any more; otherwise, when
2. it is of an earlier start of this very Slurm job, which was requeued; or of a job of this cluster that has left the queue; or
3. it has not been touched for ten minutes, by the clock of the disk, unless Slurm says that its job is suspended.

No two runs can hold it: it comes into being as a hard link to a file that is written already (or, where a disk has no hard links,
by an exclusive creation), and only one of those that find a stale lock may replace it, the one that made the link `.over`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.training.errors import BadInput
from common.training.files import find_no_room, no_room

LOCK = "run.lock"

TOUCH_SECONDS = 60.0
STALE_SECONDS = 600.0

NO_LINKS = frozenset((errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK))
"""What the system answers on a disk without hard links."""

_ATTEMPTS = 50
_PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: name of the machine, for people.
        machine: its boot and the namespace of its process numbers: where these are equal, numbers mean the same.
        pid, process_start: number of the process, and when it started, by which another one of that number is told.
        cluster, job, job_start: of Slurm; the last counts the requeues. Empty outside of a job.
        since: date and time, for people.
        token: differs from lock to lock.
    """

    host: str = "an unknown host"
    machine: str = ""
    pid: int = 0
    process_start: str = ""
    cluster: str = ""
    job: str = ""
    job_start: str = ""
    since: str = "an unknown time"
    token: str = ""

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        pid = os.getpid()
        return cls(
            platform.node(), _machine(), pid, process_start(pid) or "", os.environ.get("SLURM_CLUSTER_NAME", ""),
            os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0"),
            time.strftime("%Y-%m-%dT%H:%M:%S%z"), secrets.token_hex(8),
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Holder:
        """The holder that a lock names; an unknown one, if it is not written out yet.

        Raises:
            FileNotFoundError: no such lock.
        """
        try:
            said = json.loads(path.read_text())
            return cls(**{key: said[key] for key in (field.name for field in fields(cls))})
        except (ValueError, KeyError, TypeError):
            return cls()

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """The lock of an output folder, held between :meth:`acquire` and :meth:`release` by the process that acquired it.

    Attributes:
        taken_from: a line that says whose stale lock was taken over, if any.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self.taken_from = ""
        self._holder: Holder | None = None
        self._taken_by: Holder | None = None
        self._made: list[Path] = []
        self._ended = threading.Event()

    # --- taking it ---

    def acquire(self) -> None:
        """Takes the lock, making the folder if need be.

        Raises:
            BadInput: another run holds it, or the folder cannot be made or written to.
        """
        me = Holder.here()
        own = self.folder / f".{LOCK}.{me.token}"
        try:
            self._make_folder()
            own.write_text(json.dumps(asdict(me)) + "\n")
            self._take(me, own)
        except OSError as error:
            if find_no_room(error) is not None:
                raise no_room(self.path, error.strerror or "no room") from None
            raise BadInput(f"--output_dir {self.folder}: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
            if self._holder is None:
                self._remove_folders()
        self._remove_remains()
        threading.Thread(target=self._keep_touching, name="run lock", daemon=True).start()

    def _take(self, me: Holder, own: Path) -> None:
        for _ in range(_ATTEMPTS):
            if _create(self.path, own):
                self._holder = me
                return
            try:
                holder, age = Holder.read(self.path), own.stat().st_mtime - self.path.stat().st_mtime
            except FileNotFoundError:  # just released
                continue
            reason = why_stale(holder, me, age)
            if reason is None:
                self._refuse(holder)
            if self._replace(holder, own):
                self._holder = me
                self.taken_from = f"{self.path}: taken over from {holder}: {reason}"
                return
            time.sleep(_PAUSE_SECONDS)
        self._refuse(Holder.read(self.path))

    def _refuse(self, holder: Holder) -> None:
        raise BadInput(f"--output_dir {self.folder}: in use by {holder}; one run at a time in a folder (its lock: {self.path})")

    def _replace(self, stale: Holder, own: Path) -> bool:
        """Puts `own` in the place of a stale lock, unless somebody else is at it or was faster."""
        claim = self.folder / f".{LOCK}.{stale.token}.over"
        if not _create(claim, own):
            with contextlib.suppress(FileNotFoundError):
                if own.stat().st_mtime - claim.stat().st_mtime > STALE_SECONDS:  # whoever made it died over it
                    claim.unlink()
            return False
        try:
            if Holder.read(self.path).token != stale.token:
                return False
            os.replace(own, self.path)
            return True
        except FileNotFoundError:
            return False
        finally:
            claim.unlink(missing_ok=True)

    def _make_folder(self) -> None:
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)

    def _remove_folders(self) -> None:
        """Those that were made for the lock and have nothing else in them."""
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _remove_remains(self) -> None:
        """Checkpoints half-written by a process that was killed: nobody else writes here now."""
        for path in self.folder.glob(".*.pth.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()

    # --- holding it ---

    def check(self) -> None:
        """Raises BadInput if another run has taken the lock, after this process had stood still for too long."""
        self._touch()
        if self._taken_by is not None:
            raise BadInput(
                f"--output_dir {self.folder}: taken over by {self._taken_by}, "
                f"since this process had not touched {self.path} for {STALE_SECONDS / 60:.0f} minutes"
            )

    def _keep_touching(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            self._touch()

    def _touch(self) -> None:
        if self._holder is None or self._taken_by is not None:
            return
        with contextlib.suppress(OSError):  # a disk that does not answer now may do so in a minute
            holder = Holder.read(self.path)
            if holder.token == self._holder.token:
                os.utime(self.path)
            elif holder.token:
                self._taken_by = holder

    def release(self) -> None:
        """Removes the lock if it is this process's own; what was made for it and is empty goes too."""
        self._ended.set()
        if self._holder is None or self._holder.pid != os.getpid():
            return
        with contextlib.suppress(OSError):
            if Holder.read(self.path).token == self._holder.token:
                self.path.unlink()
        self._holder = None
        self._remove_folders()


def _create(path: Path, own: Path) -> bool:
    """Makes `path` with what `own` holds, unless it is there; whether it was made here.

    An answer that was lost on its way from a file server counts by what was done: `path` then is `own` under another name.
    """
    try:
        os.link(own, path)
        return True
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):  # released in this moment
            return os.path.samefile(own, path)
        return False
    except OSError as error:
        if error.errno in NO_LINKS:
            return _create_exclusively(path, own.read_bytes())
        raise


def _create_exclusively(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content)
        return True
    except FileExistsError:
        return False


# --- whether its holder is gone ---


def why_stale(holder: Holder, me: Holder, age: float, job_state: Callable[[str], str | None] | None = None) -> str | None:
    """Why a lock is one left behind; None while it may be held.

    Args:
        age: seconds since it was touched.
        job_state: asks Slurm, see :func:`slurm_state`.
    """
    if holder.machine and holder.machine == me.machine:
        return None if is_running(holder.pid, holder.process_start) else "this process is gone"
    if holder.job and holder.cluster == me.cluster:
        if holder.job == me.job and holder.job_start != me.job_start:
            return "this is an earlier start of the same job"
        state = (job_state or slurm_state)(holder.job)
        if state == "":
            return "this job has left the queue"
        if state == "SUSPENDED":
            return None
    return f"it was last touched {age / 60:.0f} minutes ago" if age > STALE_SECONDS else None


def is_running(pid: int, started: str) -> bool:
    """Whether the process of this number on this machine is the one that started then."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's; when it started may be hidden
        return process_start(pid) in (None, started)
    return process_start(pid) == started


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in the system's own words; None if there is none, or only its remains."""
    if Path("/proc/self/stat").exists():
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from field 3 on, see proc(5)
        except OSError:
            return None
        return None if words[0] in ("Z", "X") else words[19]
    environment = {**os.environ, "LC_ALL": "C"}
    asked = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False, env=environment)
    return asked.stdout.strip() or None


def _machine() -> str:
    """Equal for two processes that know each other by their numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def slurm_state(job: str) -> str | None:
    """State of a job in the queue; "" if it is not there any more; None where Slurm does not answer."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    if asked.returncode == 0 or "Invalid job id" in asked.stderr:
        return asked.stdout.strip()
    return None
