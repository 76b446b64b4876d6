"""What one device does in a compiled program, read from XLA's text of it.

What a loop repeats counts as often as the loop runs; XLA's own analysis counts it once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# How often (n - 1) / n of the whole array leaves each of n devices.
ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
COLLECTIVE = re.compile(rf"({'|'.join(ROUNDS)}|collective-permute)(?:-start)?")

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r" +(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
CALLED = re.compile(r"\b(?:calls|body|to_apply|\w+_computations?)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `shape` is that of its result, `rest` its operands and attributes."""

    shape: str
    kind: str
    rest: str


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that the program comes to, in its computation, and how often the loops around it repeat it."""

    instruction: Instruction
    computation: Computation
    name: str  # of the computation
    times: int

    def operands(self) -> list[str]:
        """The shapes of its operands."""
        names = re.findall(r"%([\w.\-]+)", self.instruction.rest.split("), ")[0])
        return [self.computation[name].shape for name in names]


def runs(text: str) -> Iterator[Run]:
    """All that a program comes to, every branch of a condition too; a loop of unknown length counts once."""
    program: dict[str, Computation] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := INSTRUCTION.match(line):
            program[name][match[1]] = Instruction(*match.groups()[1:])
        elif match := COMPUTATION.match(line):
            name = match[2]
            program[name] = {}
            entry = name if match[1] else entry
    return _runs(program, entry, 1)


def _runs(program: dict[str, Computation], name: str, times: int) -> Iterator[Run]:
    for instruction in program[name].values():
        yield Run(instruction, program[name], name, times)
        trips = _trips(program, instruction) if instruction.kind == "while" else 1
        for names in CALLED.findall(instruction.rest):
            for called in names.split(", "):
                yield from _runs(program, called[1:], times * trips)


def _trips(program: dict[str, Computation], loop: Instruction) -> int:
    """JAX's scans count from 0 to a constant, which is all that their condition knows."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = program[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]].values()
    limits = [i.rest.split(")")[0] for i in condition if i.kind == "constant" and i.shape.startswith("s32[]")]
    return int(limits[0]) if len(limits) == 1 else 1


def matmul_flops(text: str) -> tuple[float, float]:
    """Of matmuls and convolutions, a multiply-add counting as 2: all, and with each loop's body counted once."""
    counted = [(_flops(run), run.times) for run in runs(text)]
    return sum(flops * times for flops, times in counted), sum(flops for flops, _ in counted)


def all_flops(compiled: Any) -> float:
    """XLA's own count, with matmuls as often as their loops run; what is no matmul counts once in a loop."""
    repeated, once = matmul_flops(compiled.as_text())
    return compiled.cost_analysis()["flops"] + repeated - once


def memory_bytes(compiled: Any) -> int:
    """What a program takes on one device while it runs: arguments, results that are none of these, temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def _flops(run: Run) -> float:
    rest = run.instruction.rest
    if run.instruction.kind == "convolution":
        return _convolution_flops(run)
    if "__cudnn$fmha" in rest:
        return _cudnn_attention_flops(run)
    # Also a call of a library, in what it is told.
    contracting = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', rest)
    if contracting is None:
        return 0.0
    left = _sizes(run.operands()[0])
    over = [left[int(axis)] for axis in re.findall(r"\d+", contracting[1])]
    return 2.0 * math.prod(_sizes(run.instruction.shape)) * math.prod(over)


def _cudnn_attention_flops(run: Run) -> float:
    """Two products forward, five backward, which makes the weights again; operands are q, k, v [B, N, H, E], ..."""
    b, n, heads, width = _sizes(run.operands()[0])
    m = _sizes(run.operands()[1])[1]
    return 2.0 * (5 if "Backward" in run.instruction.rest else 2) * b * heads * n * m * width


def _convolution_flops(run: Run) -> float:
    """TPUs write matmuls as convolutions, and their batches as padded or dilated axes where most taps meet nothing."""
    rest = run.instruction.rest
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    shapes = [_sizes(shape) for shape in (*run.operands()[:2], run.instruction.shape)]
    left, kernel, out = (dict(zip(names, sizes, strict=True)) for names, sizes in zip(labels, shapes, strict=True))
    written = re.search(r"\bwindow=\{([^}]*)\}", rest)
    window = dict(item.split("=") for item in written[1].split()) if written else {}
    flops = 2.0 * out["b"] * out["f"] * kernel["i"]
    for axis in sorted(name for name in kernel if name.isdigit()):
        values = {name: value.split("x")[int(axis)] for name, value in window.items()}
        steps = [int(values.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")]
        flops *= _taps(left[axis], kernel[axis], out[axis], int(values.get("pad", "0_0").split("_")[0]), *steps)
    return flops


@functools.cache
def _taps(size: int, kernel: int, out: int, pad: int, stride: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs of a place of the result and one of the kernel, along one axis, that meet an element of the input."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilation - pad
    return int(np.sum((place >= 0) & (place <= (size - 1) * dilation) & (place % dilation == 0)))


def collectives(text: str) -> dict[str, dict[str, float]]:
    """{"all-reduce": {"count", "bytes", "sent_bytes"}, ...} of one device.

    `bytes` are those of whole arrays, before they are scattered or after they are gathered; `sent_bytes` what at least
    leaves a device, with rings.
    """
    found: dict[str, dict[str, float]] = {}
    seen = set()
    devices = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    for run in runs(text):
        match = COLLECTIVE.fullmatch(run.instruction.kind)
        channel = re.search(r"channel_id=(\d+)", run.instruction.rest)
        # A TPU spreads one over several fusions, to compute meanwhile.
        if not match or (channel and (match[1], channel[1]) in seen):
            continue
        seen.update([(match[1], channel[1])] if channel else ())
        # And sums what it scatters in a fusion of this name.
        kind = "reduce-scatter" if run.name.startswith("all-reduce-scatter") else match[1]
        n = _group(run.instruction.rest, int(devices[1]) if devices else 1)
        whole = sum(map(_bytes, run.operands())) * (n if kind == "all-gather" else 1)
        entry = found.setdefault(kind, {"count": 0, "bytes": 0, "sent_bytes": 0.0})
        entry["count"] += run.times
        entry["bytes"] += run.times * whole
        entry["sent_bytes"] += run.times * whole * (ROUNDS[kind] * (n - 1) / n if kind in ROUNDS else 1)
    return found


def _group(rest: str, devices: int) -> int:
    """How many devices take part together: {{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'b'}; {}: all."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # A part of an axis is written with its size, as 'b':(1)2.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return devices


def _sizes(shape: str) -> list[int]:
    """Of an array, or the first of several."""
    return _numbers(SHAPE.search(shape)[2])


def _bytes(shape: str) -> int:
    return sum(BYTES.get(kind, 4) * math.prod(_numbers(sizes)) for kind, sizes in SHAPE.findall(shape))


def _numbers(sizes: str) -> list[int]:
    return [int(n) for n in sizes.split(",") if n]
