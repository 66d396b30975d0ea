"""Learn a toy density in the plane: the eight of FFJORD, and more.

    python -m experiments.toy2d --data moons --steps 3000
    python -m experiments.toy2d objective:likelihood divergence:hutchinson field:mlp --widths 64 64

The gap is the held-out NLL minus that of the true density, which is known.
"""

from experiments._runner.cli import main
from experiments._tasks.density2d import ToyFlow, learn


def run(settings: ToyFlow) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn("toy2d", settings)


if __name__ == "__main__":
    main(run, ToyFlow)
