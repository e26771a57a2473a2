"""Puts the data that lies outside the packages into the wheel, at the places that powerd/resources.py names.

House rule: wheels only. An editable install reads the checkout; a copy beside it would go stale unseen.
"""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedData(BuildHookInterface[Any]):
    """Adds every folder of `powerd.resources.CHECKOUT_PLACES` to a wheel, under `powerd/data`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds; `version` is "standard" or "editable"."""
        if version == "editable":
            return
        places: dict[str, str] = runpy.run_path(str(Path(self.root) / "powerd" / "resources.py"))["CHECKOUT_PLACES"]
        for name, place in places.items():
            build_data["force_include"][str(Path(self.root) / place)] = f"powerd/data/{name}"
