import inspect
import pickle  # noqa: TID251 - that errors survive it is what is tested

import pytest

from cluster import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, errors.RaysmithError)
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_when_pickled_keeps_class_and_message(cls: type[errors.RaysmithError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("asked, found, do this")))
    assert type(copy) is cls
    assert copy.message == "asked, found, do this"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_exit_code_is_two_for_bad_input_and_bad_disks_only(
    cls: type[errors.RaysmithError],
) -> None:
    is_bad_input = issubclass(cls, errors.UserError | errors.StorageError)
    assert cls("x").exit_code == (2 if is_bad_input else 1)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_is_drawn_in_the_tree(cls: type[errors.RaysmithError]) -> None:
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__
