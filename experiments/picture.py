"""Learn an image's darkness as a density in the plane (FFJORD's img2d).

    python -m experiments.picture --image FILE

A flow with Fourier features for sharp edges is expensive to solve, so held-out numbers use a looser
tolerance and coarser cells than those of a toy.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from experiments._runner.cli import main
from experiments._runner.config import Loop, Run, Training
from experiments._runner.fields import FlowSettings, ResNet
from experiments._runner.objectives import FlowMatching, Objective
from experiments._runner.settings import MAX_WIDTH, Range
from experiments._tasks.density2d import PlaneFlow, PlaneMeasure, learn
from jcnf.data.images import MAX_SIDE, image_density, read_image_file, render_text
from jcnf.data.toys import Toy

TEXT = "jcnf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture(PlaneFlow):
    """An image, and the flow that learns it."""

    # image file to learn (.png, .jpg, ...; default: the letters jcnf)
    image: Path | None = None
    # learn the brightness instead of the darkness
    invert: bool = False
    # pixels of the longer side, to which larger images are scaled down
    side: Annotated[int, Range(2, MAX_SIDE)] = 200
    # number of extra dimensions, N(0, I) in the data, beside x (the NLL is then a bound)
    augment: Annotated[int, Range(0, MAX_WIDTH)] = 0

    objective: Objective = FlowMatching()
    flow: FlowSettings = FlowSettings(field=ResNet(fourier_features=64))
    training: Training = Training()
    # Mass is sought only within the image: none lies beyond, and there the Fourier features are
    # untrained, so that a solve takes 1000 evaluations.
    measure: PlaneMeasure = PlaneMeasure(
        test_tolerance=1e-4, test_points=10_000, cells=100, margin=1.0
    )
    loop: Loop = Loop()
    run: Run = Run()

    def make_density(self) -> Toy:
        image = render_text(TEXT) if self.image is None else read_image_file(self.image)
        name = TEXT if self.image is None else self.image.name
        return image_density(image, name, invert=self.invert, side=self.side)


def run(settings: Picture) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn("picture", settings)


if __name__ == "__main__":
    main(run, Picture)
