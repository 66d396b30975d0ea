"""Learn a picture: its darkness as a density in the plane (FFJORD's img2d)."""

from pathlib import Path

from experiments._runner.cli import main
from experiments._runner.config import preset
from experiments._tasks.density2d import PlaneFit, learn_flow
from jcnf._checks import InputError
from jcnf.data.images import LONGEST, draw_text, picture, read_picture
from jcnf.data.toys import Toy

TEXT = "jcnf"


@preset
class Picture(PlaneFit):
    """A picture, and a flow with waves for its edges, which are dear to solve: held-out numbers are
    by a looser tolerance and on coarser cells than a toy's."""

    # file of a picture (.png, .jpg, ...) to learn; by default the letters jcnf
    image: Path | None = None
    # learn what is bright in place of what is dark
    invert: bool = False
    # pixels that a longer side is scaled down to
    side: int = 200

    waves = 64
    test_tolerance = 1e-4
    test_points = 10_000
    cells = 100
    margin = 1.0  # nothing is beyond the picture, where waves were not trained: 1000 evaluations

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        if not 2 <= self.side <= LONGEST:
            raise InputError(f"--side must be from 2 to {LONGEST} pixels")
        super().check()

    def make_density(self) -> Toy:
        """What is learnt."""
        image = draw_text(TEXT) if self.image is None else read_picture(self.image)
        name = TEXT if self.image is None else self.image.name
        return picture(image, name, invert=self.invert, side=self.side)


def run(settings: Picture) -> None:
    """Train, measure on fresh points, draw the figures."""
    learn_flow("picture", settings)


if __name__ == "__main__":
    main(run, Picture)
