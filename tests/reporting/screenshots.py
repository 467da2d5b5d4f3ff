"""Pictures of a report's page, as a person sees it in a real Chromium.

Renews those in `docs/` from the full demo, after `make demo`:

    PYTHONPATH=tests .venv/bin/python -m reporting.screenshots build/demo/report.html docs

Give another folder to look at other pages.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from reporting import browser

VIEWS = {
    "light": (1100, 1350, "light", ""),
    "dark": (1100, 1150, "dark", "scale"),
    "narrow": (390, 1200, "light", "tiers"),
}
"""Width, height, colour scheme, and the section at the top."""


def take(page: Path, folder: Path) -> None:
    """Write `report-light.png`, `report-dark.png` and `report-narrow.png`."""
    command = browser.find()
    if command is None:
        sys.exit("no Chromium here; set TRAP2_BROWSER or put one on the path")
    with (
        tempfile.TemporaryDirectory() as profile,
        browser.launched(command, Path(profile)) as running,
    ):
        tab = running.tab()
        for name, (width, height, scheme, section) in VIEWS.items():
            tab.look(width, height, scheme)
            tab.open(page.resolve())
            if section:
                tab.run(f"document.getElementById('{section}').scrollIntoView()")
            path = folder / f"report-{name}.png"
            tab.picture(path)
            with Image.open(path) as seen:
                few = seen.convert("RGB").quantize(128, dither=Image.Dither.NONE)
            few.save(path, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
