"""How a model is offered: engines, replicas, the REST gateway."""
