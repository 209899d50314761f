"""The contract of a method as a plugin sees it: hyperparameters in specs, and the names of version 0.1."""

from __future__ import annotations

import pytest

import harness.method
from harness import method
from harness.method import hyperparameter


class Grown(method.Hyperparameters):
    gate: bool = hyperparameter(False, "added when runs existed", later=True)


def test_later_hyperparameter_at_its_default_is_not_in_the_spec():
    """So that runs from before it stay valid."""
    before = Grown.parse("grown", {"gate": "false"})
    assert "gate" not in before.spec_values()
    assert Grown.parse("grown", {"gate": "true"}).spec_values() == before.spec_values() | {"gate": True}
    assert Grown.parse("grown", before.spec_values()) == before


OLD_PLUGIN = """
from harness import method
from harness.method import Method, No, knob


class Old(Method):
    name, summary, source = "old", "a method for version 0.1", "none"

    class Hyperparameters(method.Hyperparameters):
        width: int = knob(3, "channels", ge=1, le=9)

    def supports(self, backbone):
        return No("not here")

    def attach(self, backbone, num_classes): ...

    def parameter_count(self, backbone, num_classes):
        return 0
"""


def test_names_of_version_0_1_work_with_a_warning():
    scope = {}
    with pytest.warns(DeprecationWarning) as warned:
        exec(OLD_PLUGIN, scope)
    assert {str(warning.message) for warning in warned} == {
        "harness.method.No is now Unsupported", "harness.method.knob is now hyperparameter",
    }  # fmt: skip
    old = scope["Old"](scope["Old"].Hyperparameters.parse("old", {"width": "4"}))
    assert old.hyperparameters.width == 4
    assert not old.supports(None) and old.supports(None) == "not here"


def test_unknown_attribute_is_an_error():
    assert not hasattr(harness.method, "Nothing")
