"""LayerGroups: layers of one kind of window, in groups of equal size."""

import pytest

from jpaged.models.config import LayerGroups


@pytest.mark.parametrize(
    ("windows", "groups", "size"),
    [
        ([None] * 5, [None], 5),
        ([8] * 5, [8], 5),
        ([8, None] * 13, [None, 8], 13),  # Gemma 2
        (([8] * 5 + [None]) * 10 + [8, 8], [None] + [8] * 6, 10),  # Gemma 3, 27B: the last group of 2 is padded
        ([8, None] * 12 + [None], [None, 8], 13),  # one layer of padding, rather than a group of one
        ([4, 8, None, 8], [None, 8, 8, 4], 1),
    ],
)
def test_layers_are_in_groups_of_equal_size(windows, groups, size):
    made = LayerGroups.of(windows)
    assert list(made.windows) == groups
    assert made.size == size
    assert len(set(made.places)) == len(windows), "no two layers share a place"
    assert [made.windows[group] for group, _ in made.places] == windows
    assert all(0 <= index < size for _, index in made.places)


def test_one_group_has_its_layers_in_order():
    assert LayerGroups.of([None] * 4).places == ((0, 0), (0, 1), (0, 2), (0, 3))
