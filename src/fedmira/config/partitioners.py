"""How examples are divided among clients: names and parameters of flwr-datasets' partitioners."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fedmira.config.strict import Count, Seed, Strict, Whole


class IidPartitioner(Strict):
    """Equal parts, drawn at random."""

    name: Literal["iid"]
    num_partitions: Count  # clients
    shuffle: bool = True  # false: parts in file order, which are alike only if the file is in random order
    seed: Seed | None = None  # null = data.seed


class SizePartitioner(Strict):
    """Parts of given sizes."""

    name: Literal["size"]
    partition_sizes: Annotated[list[Count], Field(min_length=1)]  # examples of each client
    shuffle: bool = True  # false: parts in file order
    seed: Seed | None = None  # null = data.seed


class GrowingPartitioner(Strict):
    """Parts whose sizes grow with their number i = 1, 2, ...: as i, i^2 or e^i."""

    name: Literal["linear", "square", "exponential"]
    num_partitions: Count  # clients
    shuffle: bool = True  # false: parts in file order
    seed: Seed | None = None  # null = data.seed


class DirichletPartitioner(Strict):
    """Label skew: the shares of each class are drawn from a Dirichlet distribution."""

    name: Literal["dirichlet"]
    num_partitions: Count  # clients
    partition_by: str  # the column that holds the class
    alpha: Annotated[float, Field(gt=0)] | list[Annotated[float, Field(gt=0)]]  # small = skewed, large = alike
    min_partition_size: Whole = 10  # fewest examples of a client; drawn again until each has them
    self_balancing: bool = False  # clients with more than their share get no more
    shuffle: bool = True  # order within each client
    seed: Seed | None = None  # null = data.seed


class PathologicalPartitioner(Strict):
    """Each client has only a few classes."""

    name: Literal["pathological"]
    num_partitions: Count  # clients
    partition_by: str  # the column that holds the class
    num_classes_per_partition: Count
    class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = "random"
    shuffle: bool = True  # order within each client
    seed: Seed | None = None  # null = data.seed


class ShardPartitioner(Strict):
    """Examples sorted by class and cut into shards, some for each client (McMahan et al. 2017)."""

    name: Literal["shard"]
    num_partitions: Count  # clients
    partition_by: str  # the column that holds the class
    num_shards_per_partition: Count | None = None  # this, or shard_size, or both
    shard_size: Count | None = None  # examples
    keep_incomplete_shard: bool = False  # the last shard, smaller than the others; false: its examples are left out
    shuffle: bool = True  # which shards a client gets, and their order
    seed: Seed | None = None  # null = data.seed


class NaturalIdPartitioner(Strict):
    """One client per value of a column; the same as `by`."""

    name: Literal["natural_id"]
    partition_by: str


Partitioner = (
    IidPartitioner
    | SizePartitioner
    | GrowingPartitioner
    | DirichletPartitioner
    | PathologicalPartitioner
    | ShardPartitioner
    | NaturalIdPartitioner
)
PARTITIONERS: Mapping[str, type[Strict]] = {
    name: kind for kind in get_args(Partitioner) for name in get_args(kind.model_fields["name"].annotation)
}


def partitioner_name(value: Any) -> str:
    """Return the name of a partitioner: `dirichlet`, `Dirichlet` and `DirichletPartitioner` are one; empty if none."""
    name = str(value.get("name") or "") if isinstance(value, Mapping) else ""
    return re.sub(r"_?partitioner$", "", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
