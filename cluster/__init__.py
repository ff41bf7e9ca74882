"""Where work runs: configuration, errors, storage, the Ray session, inventory and planning."""
