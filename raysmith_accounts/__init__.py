"""The commands `raysmith teams`, `keys` and `usage`: who may use the gateway, and what they used.

Takes words; changes and prints the ledger. What they change holds from a gateway's next request on,
also while it runs.
"""

from raysmith_accounts.keys import keys_app
from raysmith_accounts.teams import teams_app
from raysmith_accounts.usage import show_usage

__all__ = ["keys_app", "show_usage", "teams_app"]
