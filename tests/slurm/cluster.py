"""A real Slurm of two nodes on this machine, for tests: munge, slurmctld and one slurmd a node, all under one folder.

Where root may make namespaces, each node has a network, a host name and a hosts file of its own, and the ranks of a job
meet over a bridge; elsewhere (a plain container) the nodes are two slurmd of this host. The file system is shared, as on
a cluster. Needs root and Debian's packages (:data:`PACKAGES`); nothing of the system's own Slurm is used or changed.

By hand: `python -m tests.slurm.cluster FOLDER` starts one and waits for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import free_ports

PACKAGES = "slurmctld slurmd slurm-client munge iproute2 procps"
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NODES = ("node1", "node2")

_CONF = """\
ClusterName=masks
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credentials of its last start expire: 120 s unless said here.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# Nodes may claim more processors than there are.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=20
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here, with the way out; empty if one can."""
    programs = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "ip", "unshare", "nsenter")
    absent = [name for name in programs if shutil.which(name, path=SEARCH) is None]
    if os.geteuid() != 0 or absent:
        lacks = f"{', '.join(absent)} not found" if absent else "not root"
        return f"a real Slurm: {lacks}; as root on Debian: apt-get install {PACKAGES}, then pytest tests/slurm"
    return ""


class Cluster:
    """Starts on entry, stops on exit.

    Args:
        folder: for everything that it writes; short, as the munge socket's path must be.
        cpus, gpus: of each node, as it claims them. The GPUs are files that stand for devices: jobs are given them, and
            CUDA finds none. Where no such files can be made, nodes have no GPUs, and `gpus` becomes 0.
    """

    def __init__(self, folder: Path, cpus: int = 4, gpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.gpus = gpus if _make_devices(folder, gpus) else 0
        self.tag = f"{os.getpid() % 100000:05d}"
        self.subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.apart = _may_make_networks(self.tag)
        self.environment = {**_without_slurm(), "PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._write()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(self, *words: str, timeout: float = 60) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=timeout, check=True)
        return done.stdout

    # --- start ---

    def _write(self) -> None:
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        port, host = free_ports(8), socket.gethostname().split(".")[0]
        addresses = [f"{self.subnet}.{11 + i}" if self.apart else "127.0.0.1" for i in range(len(NODES))]
        controller = f"{self.subnet}.1" if self.apart else "127.0.0.1"
        hosts = ["127.0.0.1 localhost", f"{controller} {host}", *(f"{a} {n}" for a, n in zip(addresses, NODES, strict=True))]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        # Without this every reverse look-up of an address waits for a name server that the namespace cannot reach.
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        resources = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        lines = []
        for i, (node, address) in enumerate(zip(NODES, addresses, strict=True)):
            where = f"Port={port + 1}" if self.apart else f"NodeHostname={host} Port={port + 1 + i}"
            lines.append(f"NodeName={node} NodeAddr={address} {where} CPUs={self.cpus}{resources} State=UNKNOWN")
        (self.folder / "slurm.conf").write_text(
            _CONF.format(
                folder=self.folder, host=host, controller=controller, port=port, nodes="\n".join(lines), names=",".join(NODES)
            )
        )
        devices = f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n" if self.gpus else ""
        (self.folder / "gres.conf").write_text(devices)
        # slurmd loads a cgroup plugin even where none is used, and the one it finds by itself wants systemd.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

    def _start(self) -> None:
        at = self.folder
        self._call(
            *("munged", f"--key-file={at}/munge.key", f"--socket={at}/munge.socket", f"--pid-file={at}/munged.pid"),
            *(f"--log-file={at}/munged.log", f"--seed-file={at}/munge.seed", "--force"),
        )
        if self.apart:
            self._call("ip", "link", "add", f"mb{self.tag}", "type", "bridge")
            self._call("ip", "addr", "add", f"{self.subnet}.1/24", "dev", f"mb{self.tag}")
            self._call("ip", "link", "set", f"mb{self.tag}", "up")
        self._call("slurmctld", "-c", "-f", f"{at}/slurm.conf")
        for i, node in enumerate(NODES):
            self._start_node(i, node)
        self._wait_for_nodes()

    def _start_node(self, i: int, node: str) -> None:
        at = self.folder
        mounts = f"mount --bind {at}/hosts /etc/hosts && mount --bind {at}/nsswitch.conf /etc/nsswitch.conf"
        if self.apart:
            name, veth = f"masks{self.tag}-{node}", f"mv{self.tag}.{i}"
            self._call("ip", "netns", "add", name)
            self._call("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", name)
            self._call("ip", "link", "set", veth, "master", f"mb{self.tag}", "up")
            self._call("ip", "-n", name, "link", "set", "lo", "up")
            self._call("ip", "-n", name, "addr", "add", f"{self.subnet}.{11 + i}/24", "dev", "eth0")
            self._call("ip", "-n", name, "link", "set", "eth0", "up")
            start = f"hostname {node} && {mounts} && exec slurmd -f {at}/slurm.conf"
            self._call("nsenter", f"--net=/run/netns/{name}", "unshare", "-u", "-m", "sh", "-c", start)
        elif _allowed("unshare", "-m", "true"):
            self._call("unshare", "-m", "sh", "-c", f"{mounts} && exec slurmd -N {node} -f {at}/slurm.conf")
        else:
            self._name_here(node)
            self._call("slurmd", "-N", node, "-f", f"{at}/slurm.conf")

    def _name_here(self, node: str) -> None:
        """A line in this machine's hosts file, which :meth:`stop` takes out again."""
        with Path("/etc/hosts").open("a") as hosts:
            hosts.write(f"127.0.0.1 {node} # masks{self.tag}\n")

    def _wait_for_nodes(self) -> None:
        for _ in range(300):
            with contextlib.suppress(subprocess.SubprocessError):
                if self.run("sinfo", "-h", "-N", "-p", "all", "-t", "idle", "-o", "%N", timeout=10).split() == list(NODES):
                    return
            time.sleep(0.2)
        logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))
        raise RuntimeError(f"the nodes did not come up\n{logs}")

    # --- stop ---

    def stop(self) -> None:
        """Ends what was started here, by the process ids that the daemons wrote, and takes the networks down."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            jobs = self.run("squeue", "-h", "-o", "%A", timeout=10).split()
            if jobs:
                self.run("scancel", "--signal=KILL", "--full", *jobs, timeout=10)
                self.run("scancel", *jobs, timeout=10)
            deadline = time.monotonic() + 20
            while jobs and time.monotonic() < deadline and self.run("squeue", "-h", "-t", "R,CG", timeout=10).strip():
                time.sleep(0.2)
        for name in ("slurmctld", *(f"slurmd.{node}" for node in NODES), "munged"):
            _end(self.folder / f"{name}.pid", str(self.folder))
        for node in NODES:
            _allowed("ip", "netns", "del", f"masks{self.tag}-{node}")
        _allowed("ip", "link", "del", f"mb{self.tag}")
        hosts = Path("/etc/hosts")
        if f"# masks{self.tag}" in hosts.read_text():
            kept = [line for line in hosts.read_text().splitlines(keepends=True) if f"# masks{self.tag}" not in line]
            hosts.write_text("".join(kept))

    def _call(self, *words: str) -> None:
        with (self.folder / "start.log").open("a") as log:
            subprocess.run(words, env=self.environment, stdout=log, stderr=log, cwd=self.folder, timeout=60, check=True)


def _without_slurm() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
    return {**kept, "OMP_NUM_THREADS": "1"}


def _allowed(*words: str) -> bool:
    """Whether a command can be run here and succeeds."""
    try:
        return subprocess.run(words, env={**os.environ, "PATH": SEARCH}, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _make_devices(folder: Path, count: int) -> bool:
    """Files gpu0... that are devices, as Slurm asks of a GPU's file; they behave as /dev/null does."""
    try:
        for i in range(count):
            os.mknod(folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.stat("/dev/null").st_rdev)
    except OSError:
        return False
    return True


def _may_make_networks(tag: str) -> bool:
    """Whether namespaces, a bridge and a pair of virtual cards can be made."""
    bridge, card = f"mt{tag}", f"mu{tag}"
    try:
        return (
            _allowed("unshare", "-u", "-m", "-n", "true")
            and _allowed("ip", "netns", "add", f"masks{tag}-test")
            and _allowed("ip", "link", "add", bridge, "type", "bridge")
            and _allowed("ip", "link", "add", card, "type", "veth", "peer", "name", f"{card}p")
        )
    finally:
        for words in (("netns", "del", f"masks{tag}-test"), ("link", "del", bridge), ("link", "del", card)):
            _allowed("ip", *words)


def _end(file: Path, mark: str) -> None:
    """Ends the daemon whose id is in `file`, if it is ours: `mark` is in its command line or environment."""
    try:
        process = int(file.read_text())
        text = b"".join(Path(f"/proc/{process}/{name}").read_bytes() for name in ("cmdline", "environ"))
    except (OSError, ValueError):
        return
    if mark.encode() not in text:
        return
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not _alive(process):
                return
            time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def main(argv: Sequence[str]) -> None:
    """Starts a cluster in the folder that `argv` names, and stops it on Ctrl-C."""
    folder = Path(argv[0]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with Cluster(folder) as cluster, contextlib.suppress(KeyboardInterrupt):
        kind = "a network each" if cluster.apart else "one host"
        print(f"export SLURM_CONF={folder}/slurm.conf   # {kind}; Ctrl-C stops", flush=True)
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
