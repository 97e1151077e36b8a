"""What runs past this machine would take, from measured rates and stated bandwidths: the table of docs/scale.md.

    python -m benchmarks.scale

Measured (benchmarks/results/copying.json): core-seconds per parameter, and those of hashing alone. Stated below: the
models' shapes and the machines' cores and bandwidths. Work, disk and network overlap, so a run takes as long as
the slowest of them; the name of that one is what binds.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from surgery import memory

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "copying.json"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
GB = 1e9

# Editing fp8 (dequantise, compensate, store) over editing bfloat16, core-seconds an entry; docs/performance.md.
FP8_EDIT = 4.0


@dataclass(frozen=True)
class Model:
    """A published model's size.

    Attributes:
        parameters: Entries.
        bytes_each: Bytes of one as stored.
        shards: Files.
        largest: Shape of the tensor that takes most memory.
    """

    name: str
    parameters: float
    bytes_each: float
    shards: int
    largest: tuple[int, int]

    @property
    def size(self) -> float:
        """Bytes of one checkpoint."""
        return self.parameters * self.bytes_each


@dataclass(frozen=True)
class Machine:
    """Cores of each node, and bytes a second: of each node's disk, and of the network to the Hub in all."""

    name: str
    nodes: int
    cores: int
    disk: float
    network: float


MODELS = (
    Model("7B dense, bf16", 6.7e9, 2, 3, (32000, 4096)),
    Model("70B dense, bf16", 69e9, 2, 15, (32000, 8192)),
    Model("405B dense, bf16", 405e9, 2, 191, (128256, 16384)),
    Model("671B MoE, fp8", 671e9, 1, 163, (129280, 7168)),
)
MACHINES = (
    Machine("laptop", 1, 8, 2 * GB, 0.1 * GB),
    Machine("8-GPU node", 1, 96, 10 * GB, 1.5 * GB),
    Machine("64 nodes", 64, 96, 2 * GB, 12 * GB),
)


@dataclass(frozen=True)
class Rates:
    """Measured core-seconds: of hashing and copying, per byte of the three checkpoints; of editing, per parameter."""

    hashing: float
    editing: float


def measured() -> Rates:
    """From the 1.1B pair without a gap at the rank, whose edits need compensation: the dearest usual case."""
    rows = json.loads(RESULTS.read_text())["rows"]
    row = next(
        row for row in rows if "core-seconds" in row["name"] and "bulk, edit/weight 0.001" in row["name"]
    )
    alone = float(row["detail"].split("take ")[1].split(" s")[0])
    return Rates(alone / (6 * GB), (row["value"] - alone) / GB)


def seconds(model: Model, machine: Machine, rates: Rates) -> dict[str, float]:
    """Seconds that each resource is busy; processes beyond the number of shards have nothing to do."""
    nodes = min(machine.nodes, model.shards)
    # With few shards a node, one node has the whole of the last round.
    rounds = -(-model.shards // nodes) * nodes / model.shards
    editing = rates.editing * model.parameters * (FP8_EDIT if model.bytes_each == 1 else 1.0)
    work = (editing + rates.hashing * 3 * model.size) / (machine.cores * nodes) * rounds
    return {
        "cores": work,
        "disk": 3 * model.size / (machine.disk * nodes),
        "network": 2 * model.size / machine.network,
    }


def memory_per_process(model: Model) -> float:
    """Bytes resident in one process at most."""
    entries = model.largest[0] * model.largest[1]
    # Embeddings stay in bfloat16 where the rest is fp8.
    return memory.INTERPRETER + memory.tensor_need(model.largest, 3 * 2 * entries) + memory.BESIDE


def duration(value: float) -> str:
    """Seconds as people say them."""
    for unit, size in (("h", 3600), ("min", 60)):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} s"


def table(rates: Rates) -> str:
    """The table in Markdown."""
    lines = [
        "| model | machine | from local files | binds | streamed from the Hub | binds | memory a process "
        "| disk, local / `--stream` | traffic |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for machine in MACHINES:
            busy = seconds(model, machine, rates)
            local = max(("cores", "disk"), key=busy.__getitem__)
            remote = max(busy, key=busy.__getitem__)
            processes = min(machine.nodes, model.shards)
            held = model.size + 2 * processes * model.size / model.shards
            lines.append(
                f"| {model.name} | {machine.name} "
                f"| {duration(busy[local])} | {local} | {duration(busy[remote])} | {remote} "
                f"| {memory_per_process(model) / 2**30:.1f} GiB | {3 * model.size / GB:,.0f} / {held / GB:,.0f} GB "
                f"| {2 * model.size / GB:,.0f} GB |"
            )
    return "\n".join(lines)


def main() -> None:
    """Put the table into docs/scale.md, between its marks, and print it."""
    rates = measured()
    text = (
        f"Measured: {rates.editing * GB:.1f} core-seconds for editing 1e9 parameters, "
        f"{rates.hashing * GB:.2f} for copying and hashing 1e9 bytes.\n\n{table(rates)}"
    )
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
