"""The estimate in print: this run's figure, what is in memory, and what an update costs on 1, 8 and 64 devices."""

from collections.abc import Sequence

from lightning_tilt.estimate.memory import CONTEXT, Estimate
from lightning_tilt.estimate.sharing import ALONE, AUTO, Sharing

__all__ = ["DEVICES", "gigabytes", "scaling_rows", "table", "this_run"]

DEVICES = (1, 8, 64)
"""How many GPUs the table of many has rows for."""


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9, to the second digit."""
    return f"{size / 1e9:.2f}"


def table(found: Estimate) -> str:
    """The estimate as text, a line for every part."""
    settings = found.settings
    rows: list[tuple[str, str, str]] = []
    for (part, dtype), size in found.weights.items():
        rows.append(("weights", f"{part}, {found.counts[part] / 1e6:,.1f} M, {dtype}", gigabytes(size)))
    if settings.drops_encoders and found.encoders:
        rows.append(("", "the text encoders leave when the fit starts", f"-{gigabytes(found.encoders)}"))
    kind = settings.optimizer[0].__name__
    rows += [
        ("gradients", f"{found.trained / 1e6:,.1f} M trained", gigabytes(found.gradients)),
        ("optimiser", kind, gigabytes(found.optimizer)),
        ("average", "of what is trained" if settings.ema else "none", gigabytes(found.average)),
        ("rollout", f"{settings.samples} paths of {settings.steps} steps", gigabytes(found.trajectory)),
    ]
    if settings.cuda:
        rows.append(("CUDA", "context and workspaces, an allowance", gigabytes(CONTEXT)))
    for name, phase in found.phases.items():
        rows.append(("passing", f"{name}, {phase.samples} at once", gigabytes(phase.peak)))
    rows.append(("passing", "a step of the optimiser", gigabytes(found.optimizer_step)))
    rows.append(("peak", "all but what passes, and the largest of that", gigabytes(found.peak())))
    lines = [this_run(found), "", "Memory of one process alone in GB (10^9 bytes), computed without weights"]
    lines += [f"  {a:10s} {b:56s} {c:>9s}" for a, b, c in rows]
    lines += [f"  not counted: {what}" for what in found.uncounted]
    parts = found.forwards
    lines += [
        "",
        "Network evaluations an update of one process, in forwards of a sample",
        f"  rollout {parts['rollout']:,.0f}, adjoint {parts['adjoint']:,.0f}, loss {parts['loss']:,.0f}"
        + (f", of each of {settings.accumulate} rollouts" if settings.accumulate > 1 else "")
        + f"; together {parts['total']:,.0f}, and {parts['recomputed']:,.0f} recomputed by gradient checkpointing",
        "",
        f"  {'devices':>7s} {'samples':>8s} {'forwards':>12s} {'GB a device, ddp':>18s} {'GB a device, fsdp2':>20s}",
    ]
    lines += ["  {:>7s} {:>8s} {:>12s} {:>18s} {:>20s}".format(*row) for row in scaling_rows(found)]
    computing = ", both with its activation checkpointing" if settings.sharing.activation_checkpointing else ""
    lines.append(f"  ddp, and fsdp2 by the blocks of the denoiser, whatever this run's strategy{computing}")
    return "\n".join(lines)


def this_run(found: Estimate) -> str:
    """The figure of this very run, under its strategy; where its devices are not known, for some numbers of them."""
    settings, sharing, n = found.settings, found.settings.sharing, found.settings.processes
    if sharing.kind is None:
        return f"This run: not modelled: the strategy {sharing.name}; known are ddp and fsdp2 with its variants"
    nodes = f" of each of {settings.nodes} nodes" if settings.nodes > 1 else ""
    counts = [n] if n is not None else [m for m in DEVICES if m % settings.nodes == 0]
    if n is None:
        devices = f"all devices{nodes} that it finds"
    else:
        devices = f"{settings.devices} device{'' if settings.devices == 1 else 's'}{nodes}"
    where = sharing.name if sharing == ALONE else f"{sharing.name} on {devices}"
    told = f"This run: {where}: {_each(n, {m: found.peak(m, _on(sharing, m)) for m in counts})} a device"
    if sharing.cpu_offload:
        told += f", and {_each(n, {m: found.shards(m) for m in counts})} of the CPU's memory a process"
    return told


def _each(known: int | None, sizes: dict[int, int]) -> str:
    """One figure, or those of several numbers of devices."""
    if known is not None:
        return f"{gigabytes(sizes[known])} GB"
    return ", ".join(f"{gigabytes(size)} GB (of {n})" for n, size in sizes.items())


def _on(sharing: Sharing, devices: int) -> Sharing:
    """What "auto" does with one device."""
    return ALONE if devices == 1 and sharing == AUTO else sharing


def scaling_rows(found: Estimate, devices: Sequence[int] = DEVICES) -> list[tuple[str, str, str, str, str]]:
    """For each number of devices: samples and forwards an update, and GB on each under ddp and fsdp2."""
    settings = found.settings
    rows = []
    fsdp2 = Sharing("fsdp2", "fsdp2", family=found.family)
    for n in devices:
        samples, evaluations = n * settings.samples * settings.accumulate, n * found.forwards["total"]
        sharded = gigabytes(found.peak(n, fsdp2)) if n > 1 else "-"
        rows.append((str(n), f"{samples:,}", f"{evaluations:,.0f}", gigabytes(found.peak(n)), sharded))
    return rows
