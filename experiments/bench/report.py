"""Tables of the measurements, and the figures of the summary."""

from collections.abc import Mapping

import jax

from experiments.bench import peers
from experiments.bench.ours import NAME

Results = dict[str, dict[str, float]]  # program: {ms, ratio, their quartiles, loss, ...}
SHOWN = {  # figure: (title, format)
    "nfe": ("NFE", "{:.0f}"),
    "loss": ("loss", "{:.6f}"),
    "grad_norm": ("gradient norm", "{:.4g}"),
    "error": ("error", "{:.1e}"),
    "tolerance": ("tolerance", "{:.0e}"),
    "share": ("of the GEMM rate", "{:.2f}"),
    "gflop": ("GFLOP", "{:.3g}"),
    "compile_s": ("compile s", "{:.1f}"),
    "xla_mb": ("XLA MiB", "{:.0f}"),
    "memory_mb": ("peak MiB", "{:.0f}"),
}


def show(title: str, results: Mapping[str, Mapping[str, float]]) -> None:
    """Print a row per program: its time with quartiles, its ratio to the first, and the rest."""
    columns = [name for name in SHOWN if any(name in r for r in results.values())]
    heads = ["ms", "quartiles", "over the first", *(SHOWN[name][0] for name in columns)]
    rows = []
    for r in results.values():
        row = [f"{r['ms']:.2f}", f"{r['ms_q1']:.2f} to {r['ms_q3']:.2f}", f"{r['ratio']:.2f}"]
        rows.append(row + [SHOWN[c][1].format(r[c]) if c in r else "" for c in columns])
    lines = [["", *heads], *([name, *row] for name, row in zip(results, rows, strict=True))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) + 1)]
    print(title)
    for line in lines:
        first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join([first, *others]).rstrip(), flush=True)


def ratios(title: str, results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the ratio of each program's time to the first one's, for the summary."""
    first = next(iter(results), NAME)
    return {f"{title}: {n} / {first}": r["ratio"] for n, r in results.items() if n != first}


def conditions() -> dict[str, str | int]:
    """Return the conditions under which the numbers hold: device, threads, dtype, versions."""
    device = jax.devices()[0]
    found: dict[str, str | int] = {
        "device": device.device_kind,
        "platform": device.platform,
        "threads": peers.threads(),
        "dtype": str(jax.numpy.zeros(()).dtype),
    }
    return found | peers.versions()
