"""Plug-in folders: a file's name is the plug-in's name.

Takes a package; gives its plug-ins by name. It does not know what a plug-in must offer: each kind
states its protocol, and the contract tests run over all that are found.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType

from cluster.errors import ConfigError


def plugin_names(package: ModuleType) -> list[str]:
    """Return the names of all plug-ins in a package, sorted; `_name.py` files are not plug-ins."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load_plugin(package: ModuleType, name: str, *, what: str) -> ModuleType:
    """Import the plug-in `name`; a wrong name raises ConfigError that lists the right ones."""
    names = plugin_names(package)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        raise ConfigError(f"no {what} `{name}`; there are: {', '.join(names)}.{hint}")
    return importlib.import_module(f"{package.__name__}.{name}")
