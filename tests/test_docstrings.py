"""Entries of docstrings are taken over as they are, in their places."""

import inspect
import re

import pytest

from sklearn_softeq import SoftEquivariantClassifier, SoftEquivariantRegressor
from sklearn_softeq.docstrings import completed_from


class Source:
    """Something.

    Parameters
    ----------
    first : int
        One line.

        Another one, after a blank.
    second, third : float, default=1.0
        Of both.

    Attributes
    ----------
    first_ : int
        Another entry.

    Notes
    -----
    None.
    """


def test_entries_stand_in_their_places():
    @completed_from(Source)
    class Target:
        """Something else, with {braces} in a line.

        Parameters
        ----------
        {second}
        own : str
            Its own.
        {first}

        Attributes
        ----------
        {first_}
        """

    assert inspect.cleandoc(Target.__doc__).splitlines() == [
        "Something else, with {braces} in a line.",
        "",
        "Parameters",
        "----------",
        "second, third : float, default=1.0",
        "    Of both.",
        "own : str",
        "    Its own.",
        "first : int",
        "    One line.",
        "",
        "    Another one, after a blank.",
        "",
        "Attributes",
        "----------",
        "first_ : int",
        "    Another entry.",
    ]


def test_a_name_without_an_entry_is_an_error():
    with pytest.raises(KeyError, match="fourth"):

        @completed_from(Source)
        class Target:
            """Something.

            {fourth}
            """


def test_without_docstrings_nothing_is_done():
    class Bare:
        pass

    assert completed_from(Bare)(Bare) is Bare
    Target = completed_from(Source)(type("Target", (), {}))
    assert Target.__doc__ is None


def test_no_place_is_left_in_the_regressor():
    assert not re.findall(r"^ *{\w+}$", SoftEquivariantRegressor.__doc__, re.MULTILINE)
    width = re.search(r" *width : .*?(?= *activation : )", SoftEquivariantClassifier.__doc__, re.S)
    assert width[0] in SoftEquivariantRegressor.__doc__
