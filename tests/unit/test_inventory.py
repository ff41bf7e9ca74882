from typing import Any

from cluster.inventory import Inventory, Node, local_inventory, parse_nodes


def ray_node(name: str = "aa", *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {
        "NodeID": name,
        "Alive": alive,
        "NodeManagerHostname": "far",
        "Resources": {"CPU": 8.0, "memory": 1e9, "node:1.2.3.4": 1.0, **resources},
        "Labels": {"ray.io/node-id": name},
    }


def test_local_inventory_describes_this_machine() -> None:
    (node,) = local_inventory().nodes
    assert node.cpus >= 1
    assert node.memory_bytes > 2**28
    assert node.cpu is not None
    assert not node.is_spot


def test_parse_nodes_leaves_dead_ones_out_and_sorts() -> None:
    nodes = [ray_node("b"), ray_node("c", alive=False), ray_node("a")]
    assert [node.id for node in parse_nodes(nodes).nodes] == ["a", "b"]


def test_parse_nodes_reads_gpu_kind_from_the_resource() -> None:
    (node,) = parse_nodes([ray_node(GPU=4.0, **{"accelerator_type:H100": 1.0})]).nodes
    assert (node.gpus, node.accelerator) == (4.0, "H100")


def test_parse_nodes_reads_kind_and_market_from_labels() -> None:
    node = ray_node(TPU=4.0)
    node["Labels"] |= {"ray.io/accelerator-type": "TPU-V6E", "ray.io/market-type": "spot"}
    (parsed,) = parse_nodes([node]).nodes
    assert (parsed.gpus, parsed.accelerator, parsed.is_spot) == (4.0, "TPU v6e", True)


def test_parse_nodes_when_kind_is_not_in_the_catalogue_keeps_its_name() -> None:
    (node,) = parse_nodes([ray_node(GPU=1.0, **{"accelerator_type:V100": 1.0})]).nodes
    assert node.accelerator == "V100"


def test_parse_nodes_knows_the_cpu_of_this_host_only() -> None:
    far, near = parse_nodes([ray_node("far")]), parse_nodes([ray_node("near")], hostname="far")
    assert far.nodes[0].cpu is None
    assert near.nodes[0].cpu is not None


def test_inventory_sums_its_nodes() -> None:
    nodes = tuple(Node(id=name, cpus=2, gpus=1, memory_bytes=1) for name in "ab")
    inventory = Inventory(nodes=nodes)
    assert (inventory.cpus, inventory.gpus) == (4, 2)
