"""What a partition could ever give, asked of Slurm before a job is submitted: for more than that it would wait for ever."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from common.training.errors import BadInput

SECONDS = 20
"""That Slurm is given to answer."""

_COLUMNS = ("%R", "%P", "%D", "%c", "%s", "%B")  # name, name* if default, nodes, their CPUs, nodes and CPUs a job may have
_OTHER_SHAPE = (
    *("-p", "-N", "-n", "-c", "-O", "-M", "--partition", "--nodes", "--ntasks", "--cpus", "--overcommit", "--clusters"),
    "--mincpus",
)


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that have equally many CPUs, whatever state they are in.

    Attributes:
        cpus: that a job may use on each of them.
        most_nodes: that a job may have of the partition; None without a limit.
    """

    partition: str
    default: bool
    nodes: int
    cpus: int
    most_nodes: int | None


@dataclass(frozen=True)
class Request:
    """What a job asks of a partition: nodes, and ranks of so many CPUs on each.

    Attributes:
        partition: names with commas between them; empty: the cluster's default.
        qos: one may lift a partition's limits of nodes, which then are not looked at.
        options: more options of sbatch; if they ask for other nodes, tasks or CPUs, nothing is checked.
    """

    partition: str
    nodes: int
    ranks_per_node: int
    cpus_per_task: int
    qos: str = ""
    options: str = ""


def check_partition(request: Request) -> None:
    """Raises BadInput if no partition of the request has what it asks for, busy nodes and drained ones counted.

    Where Slurm does not answer, or knows no such partition, nothing is refused here: sbatch says it.
    """
    if any(word.startswith(_OTHER_SHAPE) for word in request.options.split()):
        return
    groups = read_groups(request.partition)
    names = dict.fromkeys(group.partition for group in groups if request.partition or group.default)
    reasons = [reason_against([group for group in groups if group.partition == name], request) for name in names]
    if reasons and all(reasons):
        raise BadInput(f"{'; '.join(reasons)}: the job would wait for ever")


def reason_against(groups: list[NodeGroup], request: Request) -> str:
    """Why the nodes of a partition can never do; empty if they can."""
    cpus, name = request.ranks_per_node * request.cpus_per_task, groups[0].partition
    asked = f"{cpus} CPUs a node ({request.ranks_per_node} ranks x {request.cpus_per_task})"
    total = sum(group.nodes for group in groups)
    fitting = sum(group.nodes for group in groups if group.cpus >= cpus)
    limit = None if request.qos else groups[0].most_nodes
    if total < request.nodes:
        return f"{request.nodes} nodes are asked for, but partition {name} has {total}"
    if not fitting:
        return f"{asked} are asked for, but partition {name} has at most {max(group.cpus for group in groups)}"
    if fitting < request.nodes:
        return f"{request.nodes} nodes with {asked} are asked for, but partition {name} has {fitting} such nodes"
    if limit is not None and limit < request.nodes:
        return f"{request.nodes} nodes are asked for, but partition {name} gives a job at most {limit}"
    return ""


def read_groups(partition: str) -> list[NodeGroup]:
    """The nodes of these partitions, or of all of them; none where Slurm cannot be asked."""
    words = ["sinfo", "--noheader", "--exact", "--noconvert", f"--format={'|'.join(_COLUMNS)}"]
    words += [f"--partition={partition}"] if partition else []
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
        return [_group(*line.split("|")) for line in answer.splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return []


def _group(name: str, marked: str, nodes: str, cpus: str, job_size: str, cpus_of_job: str) -> NodeGroup:
    """From a line of sinfo. Raises ValueError for what is no number."""
    usable = [int(number) for number in (cpus, cpus_of_job) if number.strip() != "UNLIMITED"]
    most = job_size.strip().rpartition("-")[2]
    return NodeGroup(
        name.strip(), marked.strip().endswith("*"), int(nodes), min(usable), None if most == "infinite" else int(most)
    )
