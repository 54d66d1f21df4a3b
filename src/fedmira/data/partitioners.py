"""Deal examples to partitions at random, by class or in given numbers, as the partitioners of flwr-datasets do.

Names, parameters, defaults and draws are those of flwr-datasets 0.6.1: the same labels and seed give the same parts in
the same order. The package is not a dependency, because it requires `datasets` below version 5.

Every function returns one int64 array of example indices per partition, and no example is in two of them. `iid`,
`dirichlet`, `linear`, `square` and `exponential` deal every example; the others say what they leave out.
Classes are the distinct labels in lexical order ("10" before "2", "Z" before "a"), independent of their order in the
data. flwr orders a column of numbers as numbers: with ten or more such classes its parts differ from these.
Errors never show a label: it may be the text of an example.

`iid`, `size`, `linear`, `square` and `exponential` cut the examples in their order. If that order is not random (a
file sorted by task), cut `draw_order` instead: a part's examples are then order[part]. flwr's FederatedDataset does
this for every partitioner, unless shuffle=False.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedmira.errors import DataError, nearest

Indices = NDArray[np.int64]
ClassAssignment = Literal["random", "deterministic", "first-deterministic"]

FAULTS_SHOWN = 5
DIRICHLET_DRAWS = 11  # as many as flwr-datasets tries
LARGEST_ALPHA = 1e300  # far beyond any use; above about 1e308 / num_partitions, the draws overflow to zeros


def draw_order(count: int, *, seed: int = 42) -> Indices:
    """Return the examples [count] in the order in which flwr's FederatedDataset(shuffle=True, seed=seed) has them.

    Raises DataError if the seed is below 0.
    """
    return _generator(seed).permutation(count)


def iid(count: int, *, num_partitions: int) -> list[Indices]:
    """Cut the examples into consecutive parts whose sizes differ by at most one, the larger ones first.

    Random only if the order is: see `draw_order`.
    Raises DataError if there are no partitions, or more partitions than examples.
    """
    _check_partitions(num_partitions, count)
    least, larger = divmod(count, num_partitions)
    return _cut([least + (partition < larger) for partition in range(num_partitions)])


def size(count: int, *, partition_sizes: Sequence[int]) -> list[Indices]:
    """Cut consecutive parts of the given sizes; examples beyond their sum are left out.

    Random only if the order is: see `draw_order`.
    Raises DataError if there are no sizes, one is below 1, or they sum to more than `count`.
    """
    if not partition_sizes:
        raise _fault("partition_sizes is empty: give at least one size")
    _check_least(1, **{f"partition_sizes[{partition}]": length for partition, length in enumerate(partition_sizes)})
    if sum(partition_sizes) > count:
        raise _fault(f"partition_sizes sum to {sum(partition_sizes)}: at most {count}, the number of examples")
    return _cut(partition_sizes)


def linear(count: int, *, num_partitions: int) -> list[Indices]:
    """Cut consecutive parts in proportion to 1, 2, ..., num_partitions.

    size_i = floor(count * i / sum_j j); the last part also gets what rounding leaves.
    Raises DataError if there are no partitions, or a part would be empty.
    """
    return _in_proportion(count, num_partitions, units=np.positive)


def square(count: int, *, num_partitions: int) -> list[Indices]:
    """Cut consecutive parts in proportion to 1, 4, ..., num_partitions^2; otherwise as `linear`."""
    return _in_proportion(count, num_partitions, units=np.square)


def exponential(count: int, *, num_partitions: int) -> list[Indices]:
    """Cut consecutive parts in proportion to e, e^2, ..., e^num_partitions; otherwise as `linear`."""
    return _in_proportion(count, num_partitions, units=np.exp)


def dirichlet(
    labels: Sequence[str],
    *,
    num_partitions: int,
    alpha: float | Sequence[float],
    min_partition_size: int = 10,
    self_balancing: bool = False,
    shuffle: bool = True,
    seed: int = 42,
) -> list[Indices]:
    """Deal each class in shares drawn from a Dirichlet distribution: the smaller alpha, the fewer classes in a part.

    For each class in turn p ~ Dir(alpha), and part k gets its examples from floor(n * sum_{j<k} p_j) to
    floor(n * sum_{j<=k} p_j), n the number of examples in the class.
    alpha: one number for all partitions, or one for each. self_balancing: a part above the average size gets nothing of
    later classes. Everything is drawn again, at most ten times, while a part is below min_partition_size or a class
    has no share above zero (where flwr-datasets would give the whole class to the last part, full or not).
    shuffle: put each part in random order, else class after class.
    Raises DataError if the numbers are out of range, or no draw is accepted.
    Source: Yurochkin et al. 2019 (arXiv:1905.12022); flwr-datasets for the balancing.
    """
    count = len(labels)
    _check_partitions(num_partitions, count)
    _check_least(0, min_partition_size=min_partition_size)
    if min_partition_size * num_partitions > count:
        raise _fault(
            f"min_partition_size = {min_partition_size} in each of {num_partitions} partitions: at most "
            f"{count // num_partitions} with {count} examples"
        )
    alphas, classes, generator = _alphas(alpha, num_partitions), _classes(labels), _generator(seed)
    best = -1
    for _ in range(DIRICHLET_DRAWS):
        pieces = _draw_dirichlet(classes, alphas, self_balancing=self_balancing, generator=generator)
        smallest = min((sum(map(len, parts)) for parts in pieces), default=-1)
        if smallest >= min_partition_size:
            return _join(pieces, shuffle=shuffle, generator=generator)
        best = max(best, smallest)
    if best < 0:
        raise _fault(
            f"self_balancing: each of {DIRICHLET_DRAWS} draws with alpha = {_span(alphas)} gave all shares of a "
            "class to partitions above the average size; raise alpha, or set self_balancing to false"
        )
    raise _fault(
        f"none of {DIRICHLET_DRAWS} draws with alpha = {_span(alphas)} gave each of {num_partitions} partitions "
        f"min_partition_size = {min_partition_size} examples (the best one gave {best}); raise alpha, or lower "
        "min_partition_size or num_partitions"
    )


def pathological(
    labels: Sequence[str],
    *,
    num_partitions: int,
    num_classes_per_partition: int,
    class_assignment_mode: ClassAssignment = "random",
    shuffle: bool = True,
    seed: int = 42,
) -> list[Indices]:
    """Give each partition exactly num_classes_per_partition classes, each class cut evenly over those that have it.

    class_assignment_mode, with C classes: "random" draws a partition's classes without replacement; "deterministic"
    gives partition k the classes k, k + 1, ... modulo C; "first-deterministic" gives it class k modulo C and draws
    the others. Examples of a class that no partition has are left out.
    shuffle: put each part in random order, else class after class.
    Raises DataError if the numbers are out of range, or more partitions have a class than it has examples.
    Source: Li et al. 2022 (arXiv:2102.02079), there "first-deterministic".
    """
    _check_partitions(num_partitions, len(labels))
    classes, generator = _classes(labels), _generator(seed)
    _check_least(1, num_classes_per_partition=num_classes_per_partition)
    if num_classes_per_partition > len(classes):
        raise _fault(
            f"num_classes_per_partition = {num_classes_per_partition}: at most {len(classes)}, the number of classes"
        )
    chosen = _choose_classes(
        class_assignment_mode,
        num_partitions,
        classes=len(classes),
        each=num_classes_per_partition,
        generator=generator,
    )
    takers: list[list[int]] = [[] for _ in classes]
    for partition, numbers in enumerate(chosen):
        for number in numbers:
            takers[number].append(partition)
    pieces: list[list[Indices]] = [[] for _ in range(num_partitions)]
    for number, (members, owners) in enumerate(zip(classes, takers, strict=True)):
        if len(owners) > len(members):
            raise _fault(
                f"{len(owners)} partitions need class {number + 1} of {len(classes)} (in lexical "
                f"order), which has {len(members)} examples; lower num_partitions or num_classes_per_partition, or set "
                "class_assignment_mode to deterministic, which spreads the classes evenly"
            )
        for owner, piece in zip(owners, np.array_split(members, max(len(owners), 1)), strict=False):
            pieces[owner].append(piece)
    return _join(pieces, shuffle=shuffle, generator=generator)


def shard(
    labels: Sequence[str],
    *,
    num_partitions: int,
    num_shards_per_partition: int | None = None,
    shard_size: int | None = None,
    keep_incomplete_shard: bool = False,
    shuffle: bool = True,
    seed: int = 42,
) -> list[Indices]:
    """Sort the examples by class, cut them into shards of one size, and deal the shards at random.

    num_shards_per_partition: None = all shards, the first partitions one more if the division is not even.
    shard_size: None = floor(examples / (num_partitions * num_shards_per_partition)). One of the two must be given.
    keep_incomplete_shard: the examples after the last full shard are a shard too (ignored if both are given).
    Left out: that last shard if not kept, and, where num_shards_per_partition is given, the shards beyond that number.
    shuffle: put each part in random order, else shard after shard.
    Raises DataError if the numbers are out of range, or there are fewer shards than needed or than partitions.
    Source: McMahan et al. 2017 (arXiv:1602.05629), section 3.
    """
    count = len(labels)
    _check_partitions(num_partitions, count)
    if num_shards_per_partition is None and shard_size is None:
        raise _fault("neither num_shards_per_partition nor shard_size is given: give one of them, or both")
    settings = {"num_shards_per_partition": num_shards_per_partition, "shard_size": shard_size}
    _check_least(1, **{name: number for name, number in settings.items() if number is not None})
    needed = None if num_shards_per_partition is None else num_partitions * num_shards_per_partition
    full = needed is not None and shard_size is not None  # flwr then ignores an incomplete shard
    length = shard_size if shard_size is not None else max(count // (needed or 1), 1)
    shards = -(-count // length) if keep_incomplete_shard and not full else count // length
    least = num_partitions if needed is None else needed
    if shards < least:
        raise _fault(
            f"{count} examples make {shards} shards of {length}, but num_partitions = {num_partitions} needs "
            f"{least}; lower shard_size, num_shards_per_partition or num_partitions"
        )
    order, generator = np.concatenate(_classes(labels)), _generator(seed)
    drawn = generator.permutation(shards)[:needed]
    pieces = [
        [order[number * length : (number + 1) * length] for number in drawn[part]]
        for part in iid(len(drawn), num_partitions=num_partitions)
    ]
    return _join(pieces, shuffle=shuffle, generator=generator)


def _fault(text: str) -> DataError:
    """Return the error of a partitioner."""
    return DataError(f"data.clients.partitioner: {text}")


def _check_least(least: int, **numbers: int) -> None:
    """Raise one DataError for the first few numbers below `least`."""
    faults = [f"{name} = {number}: must be at least {least}" for name, number in numbers.items() if number < least]
    if faults:
        raise _fault("; ".join(faults[:FAULTS_SHOWN]))


def _check_partitions(num_partitions: int, count: int) -> None:
    """Raise DataError if there are no partitions, or more partitions than examples."""
    _check_least(1, num_partitions=num_partitions)
    if num_partitions > count:
        raise _fault(f"num_partitions = {num_partitions}: at most {count}, the number of examples")


def _generator(seed: int) -> np.random.Generator:
    """Return the random generator of a seed."""
    _check_least(0, seed=seed)
    return np.random.default_rng(seed)


def _classes(labels: Sequence[str]) -> list[Indices]:
    """Return each class's examples, ascending; the classes in lexical order.

    Not an array of texts: numpy treats "a" and "a\\0" as equal.
    """
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return [np.array(members[label], dtype=np.int64) for label in sorted(members)]


def _cut(sizes: Sequence[int]) -> list[Indices]:
    """Return consecutive ranges of the given sizes, the first from 0."""
    return [np.arange(end - length, end, dtype=np.int64) for length, end in zip(sizes, accumulate(sizes), strict=True)]


def _in_proportion(
    count: int, num_partitions: int, *, units: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> list[Indices]:
    """Cut consecutive parts in proportion to units([1, ..., num_partitions]), rounded down; the last takes all left."""
    _check_partitions(num_partitions, count)
    with np.errstate(over="ignore", invalid="ignore"):  # e^710 overflows; then the first parts are empty and refused
        weights = units(np.arange(1.0, num_partitions + 1))
        shares = weights / weights.sum() * count
    if not (shares[:-1] >= 1).all():
        raise _fault(
            f"num_partitions = {num_partitions}: the smallest part of {count} examples would be empty; lower it"
        )
    sizes = [int(number) for number in shares[:-1]]
    return _cut([*sizes, count - sum(sizes)])


def _join(pieces: Sequence[Sequence[Indices]], *, shuffle: bool, generator: np.random.Generator) -> list[Indices]:
    """Return each partition's pieces as one array, in random order if `shuffle`."""
    parts = [np.concatenate(partition) for partition in pieces]
    if shuffle:
        for part in parts:
            generator.shuffle(part)
    return parts


def _alphas(alpha: float | Sequence[float], num_partitions: int) -> NDArray[np.float64]:
    """Return one concentration per partition. Raises DataError: a wrong number of them, or one out of range."""
    alphas = np.asarray(alpha, dtype=np.float64)
    if alphas.ndim and alphas.shape != (num_partitions,):
        raise _fault(f"alpha has {alphas.size} numbers, num_partitions is {num_partitions}: give one for each, or one")
    odd = alphas[~((alphas > 0) & (alphas <= LARGEST_ALPHA))]
    if odd.size:
        raise _fault(f"alpha = {odd[0]:g}: must be above 0 and at most {LARGEST_ALPHA:g}")
    return np.broadcast_to(alphas, (num_partitions,))


def _span(numbers: NDArray[np.float64]) -> str:
    """Return the numbers for an error: the common value, or the smallest and the largest."""
    least, most = f"{numbers.min():g}", f"{numbers.max():g}"
    return least if least == most else f"{least} to {most}"


def _draw_dirichlet(
    classes: Sequence[Indices],
    alphas: NDArray[np.float64],
    *,
    self_balancing: bool,
    generator: np.random.Generator,
) -> list[list[Indices]]:
    """Deal every class once; an empty list if balancing leaves a class without a share above zero."""
    average = sum(map(len, classes)) / len(alphas)
    sizes = np.zeros(len(alphas), dtype=np.int64)
    pieces: list[list[Indices]] = [[] for _ in alphas]
    for members in classes:
        shares = generator.dirichlet(alphas)
        if self_balancing:
            shares[sizes > average] = 0.0
            total = _add(shares.tolist())
            if not total > 0:
                return []
            shares /= total
        cuts = (np.cumsum(shares) * len(members)).astype(np.int64)[:-1]
        for partition, piece in zip(pieces, np.split(members, cuts), strict=True):
            partition.append(piece)
        sizes += np.diff(cuts, prepend=0, append=len(members))
    return pieces


def _add(numbers: Sequence[float]) -> float:
    """Add numbers one by one, as flwr does on Python 3.11: since 3.12 `sum` compensates, and cuts elsewhere."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def _choose_classes(
    mode: ClassAssignment, num_partitions: int, *, classes: int, each: int, generator: np.random.Generator
) -> list[list[int]]:
    """Return the class numbers of every partition, `each` different ones."""
    allowed = get_args(ClassAssignment)
    if mode not in allowed:
        raise _fault(f"class_assignment_mode = '{mode}'{nearest(mode, allowed)}: must be one of {', '.join(allowed)}")
    if mode == "random":
        return [generator.choice(classes, size=each, replace=False).tolist() for _ in range(num_partitions)]
    if mode == "deterministic":
        return [[(partition + step) % classes for step in range(each)] for partition in range(num_partitions)]
    chosen = []
    for partition in range(num_partitions):
        own_classes = [partition % classes]
        while len(own_classes) < each:  # drawn with replacement and repeats dropped, to match flwr's draws
            number = int(generator.integers(classes))
            if number not in own_classes:
                own_classes.append(number)
        chosen.append(own_classes)
    return chosen
