"""Learn an image's darkness as a density in the plane (FFJORD's img2d)."""

from pathlib import Path

from experiments._runner.cli import main
from experiments._runner.config import preset
from experiments._tasks.density2d import PlaneFit, learn_flow
from jcnf._checks import InputError
from jcnf.data.images import MAX_SIDE, image_density, read_image_file, render_text
from jcnf.data.toys import Toy

TEXT = "jcnf"


@preset
class Picture(PlaneFit):
    """An image, and a flow with waves for its edges.

    Waves are expensive to solve, so held-out numbers use a looser tolerance and coarser cells than
    those of a toy.
    """

    # image file to learn (.png, .jpg, ...; default: the letters jcnf)
    image: Path | None = None
    # learn the brightness instead of the darkness
    invert: bool = False
    # pixels of the longer side, to which larger images are scaled down
    side: int = 200

    waves = 64
    test_tolerance = 1e-4
    test_points = 10_000
    cells = 100
    # Seek mass only within the image: none lies beyond, and there the waves are untrained, so that
    # a solve takes 1000 evaluations.
    margin = 1.0

    def check(self) -> None:
        if not 2 <= self.side <= MAX_SIDE:
            raise InputError(f"--side must be from 2 to {MAX_SIDE} pixels; got {self.side}")
        super().check()

    def make_density(self) -> Toy:
        image = render_text(TEXT) if self.image is None else read_image_file(self.image)
        name = TEXT if self.image is None else self.image.name
        return image_density(image, name, invert=self.invert, side=self.side)


def run(settings: Picture) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn_flow("picture", settings)


if __name__ == "__main__":
    main(run, Picture)
