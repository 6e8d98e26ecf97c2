"""The estimate in print: what is in memory, and what an update costs on 1, 8 and 64 devices."""

from collections.abc import Sequence

from lightning_tilt.estimate.memory import CONTEXT, Estimate

__all__ = ["DEVICES", "gigabytes", "scaling_rows", "table"]

DEVICES = (1, 8, 64)


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
    lines = ["Memory of one process in GB (10^9 bytes), computed without weights"]
    lines += [f"  {a:10s} {b:56s} {c:>9s}" for a, b, c in rows]
    lines += [f"  not counted: the network of {name}" for name in found.uncounted]
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
    lines.append("  plain ddp and fsdp2, whatever the strategy: _checkpoint, _offload and bucket views need less")
    return "\n".join(lines)


def scaling_rows(found: Estimate, devices: Sequence[int] = DEVICES) -> list[tuple[str, str, str, str, str]]:
    """For each number of devices: samples and forwards an update, and GB on each under ddp and fsdp2."""
    settings = found.settings
    rows = []
    for n in devices:
        samples, evaluations = n * settings.samples * settings.accumulate, n * found.forwards["total"]
        ddp, fsdp = (gigabytes(found.peak(n, strategy)) for strategy in ("ddp", "fsdp2"))
        rows.append((str(n), f"{samples:,}", f"{evaluations:,.0f}", ddp, fsdp if n > 1 else "-"))
    return rows
