"""Equal shares of the engine between those who use it, counted in tokens.

Takes what each tenant was given; says whose turn it is, and how much of a pass each may take. Pure:
it does not know about blocks, slots or models, or what it is that waits.

Service is counted as in the virtual token counter of Sheng et al. (2024), "Fairness in Serving
Large Language Models": the tenant with the least service is next, and one that comes back from a
pause starts where the least served of the others stands, so that idle time is not saved up.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serving.engines.native.sequence import Sequence

WorkT = TypeVar("WorkT")
_HEAVY = 2  # Times the fewest sequences of a tenant, above which another is held back.


@dataclass(eq=False)
class TenantOf(Generic[WorkT]):
    """One tenant's work, and the tokens computed for it so far (`served`)."""

    name: str
    served: int = 0
    waiting: deque[WorkT] = field(default_factory=deque)
    running: list[WorkT] = field(default_factory=list)

    @property
    def is_active(self) -> bool:
        """Whether any of its work waits or runs."""
        return bool(self.waiting or self.running)


class TenantsOf(Generic[WorkT]):
    """All tenants that are active, or still ahead of the others."""

    def __init__(self) -> None:
        self._tenants: dict[str, TenantOf[WorkT]] = {}
        self._floor = 0  # What the last tenant that was active had been served.

    def active(self) -> list[TenantOf[WorkT]]:
        """Return active tenants, the least served first."""
        active = [tenant for tenant in self._tenants.values() if tenant.is_active]
        return sorted(active, key=lambda tenant: tenant.served) if len(active) > 1 else active

    def enter(self, name: str) -> TenantOf[WorkT]:
        """Return a tenant that is about to become active, or is."""
        tenant = self._tenants.get(name)
        if tenant is not None and tenant.is_active:
            return tenant
        active = self.active()
        floor = active[0].served if active else self._floor
        self._forget(floor)
        tenant = self._tenants.setdefault(name, TenantOf(name))
        tenant.served = max(tenant.served, floor)
        return tenant

    def get(self, name: str) -> TenantOf[WorkT]:
        """Return a tenant that has entered."""
        return self._tenants[name]

    def leave(self, tenant: TenantOf[WorkT]) -> None:
        """Note that a tenant may have no work left."""
        if not any(other.is_active for other in self._tenants.values()):
            self._floor = max(self._floor, tenant.served)

    def _forget(self, floor: int) -> None:
        """Drop idle tenants that would be lifted to `floor` when they came back."""
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if tenant.is_active or tenant.served > floor
        }


Tenant = TenantOf[Sequence]
Tenants = TenantsOf[Sequence]


def limits(num_sequences: Mapping[str, int], budget: int, spare: int | None) -> dict[str, int]:
    """Return the most tokens that each tenant may take in one pass.

    A tenant is heavy if it has more than twice the sequences of the one with the fewest. Heavy ones
    together get `spare` tokens, and each as many more as the fewest sequences are; what others take
    is bounded by `budget` alone. Without `spare` nobody is heavy.
    """
    allowed = dict.fromkeys(num_sequences, budget)
    if spare is None or not num_sequences:
        return allowed
    fewest = min(num_sequences.values())
    heavy = [name for name, count in num_sequences.items() if count > _HEAVY * fewest]
    for place, name in enumerate(heavy):
        share = spare // len(heavy) + (place < spare % len(heavy))
        allowed[name] = min(fewest + share, budget)
    return allowed
