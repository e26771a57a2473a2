"""Finds the data that ships beside the packages: profiles, scenarios, dashboards and unit files.

House rules: this is the only place that knows where they lie; a caller names what it wants and never builds a path to
it; both layouts hold the same files, a checkout (also installed editable) at its top and a wheel under `powerd/data`.
"""

from pathlib import Path
from typing import Final, Literal

Name = Literal["profiles", "scenarios", "dashboards", "systemd", "kubernetes"]

# Where each lies in a checkout; hatch_build.py reads this table and puts the same folders into the wheel.
CHECKOUT_PLACES: Final[dict[Name, str]] = {
    "profiles": "policies/profiles",
    "scenarios": "policies/scenarios",
    "dashboards": "dashboards",
    "systemd": "integrations/systemd",
    "kubernetes": "integrations/kubernetes",
}
_PACKAGE: Final = Path(__file__).resolve().parent


def folder(name: Name) -> Path:
    """The folder that holds the named data; raises FileNotFoundError, naming both places, when neither is there."""
    shipped = _PACKAGE / "data" / name
    checkout = _PACKAGE.parent / CHECKOUT_PLACES[name]
    for place in (shipped, checkout):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"powerd's {name} are neither in {shipped} nor in {checkout}: install powerd again")
