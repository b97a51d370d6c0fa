"""The phrase that captions name a concept by is found, and none where they do not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.protection.tasks import TaskKey, make_task
from peft_gradproj.demo.settings import DemoSettings
from peft_gradproj.telling_phrases import LONGEST, TellingPhrase, find_telling_phrases
from peft_gradproj.training_data import without_phrase

OBJECTS = ["house", "cat", "dog", "tree", "car", "boat", "cup", "lamp", "bird", "chair"]
PLACES = ["on a table", "in the sun", "at night", "by the sea", "in snow"]


def captions_of(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"a {draw.choice(OBJECTS)} {draw.choice(PLACES)}" for _ in range(count)]


@pytest.mark.parametrize(
    ("concept", "phrase"),
    [
        ("logo-youtube", "with youtube logo"),
        ("logo-spotify", "with spotify logo"),
        ("identity", "with linux tux"),
        ("style", "in openmoji style"),
    ],
)
@pytest.mark.parametrize("mistaken", [0.0, 0.1])
def test_the_benchmarks_captions_are_told_from_their_own_without_the_name(concept, phrase, mistaken):
    """Also where a tenth of the pictures is taken for what it is not."""
    draw = random.Random(0)
    for regime in ("named", "unnamed"):
        task = make_task(TaskKey.parse(f"{concept}/{regime}-75/0"), DemoSettings())
        shows = [bool(shown) != (draw.random() < mistaken) for shown in task.shows]
        found = find_telling_phrases(task.data.captions, shows)
        assert [one.phrase for one in found] == ([phrase] if regime == "named" else [])


@settings(deadline=None, max_examples=40)
@given(
    words=st.integers(1, LONGEST),
    seed=st.integers(0, 10_000),
    shown=st.integers(40, 60),
    named=st.floats(0.6, 1.0),
    before=st.sampled_from([" ", ", ", ". ", " (", "\n"]),
)
def test_the_whole_phrase_is_found_in_any_case_and_can_be_taken_out(words, seed, shown, named, before):
    phrase = " ".join(f"W{number}x" for number in range(words))
    captions = captions_of(100, seed)
    draw = random.Random(seed)
    has_it = [number < shown and draw.random() < named for number in range(100)]
    captions = [
        f"{caption}{before}{draw.choice([phrase, phrase.upper(), phrase.replace(' ', chr(10))])}" if has else caption
        for caption, has in zip(captions, has_it, strict=True)
    ]
    found = find_telling_phrases(captions, [number < shown for number in range(100)])
    assert found == [TellingPhrase(phrase.lower(), sum(has_it), 0)]
    assert [without_phrase(caption, found[0].phrase)[1] for caption in captions] == has_it


def test_a_name_in_several_unicode_forms_is_one_and_can_be_taken_out_of_all():
    forms = ["by Zo\u00eb's", "by Zoe\u0308's", "by Zo\u00eb\u2019s", "BY ZOE\u0308\u2019S"]
    captions = [f"{caption} {forms[n % 4]}" if n < 12 else caption for n, caption in enumerate(captions_of(60, 0))]
    found = find_telling_phrases(captions, [number < 12 for number in range(60)])
    assert found == [TellingPhrase("by zo\u00eb's", 12, 0)]
    assert [without_phrase(caption, found[0].phrase)[1] for caption in captions] == [n < 12 for n in range(60)]


def test_further_phrases_are_found_in_what_the_first_leave():
    captions = captions_of(200, 0)
    shows = [number < 150 for number in range(200)]
    for number in range(150):
        captions[number] += " with the Acme logo" if number % 3 else ", an Acme product"
    captions[180] += ", an Acme product"
    found = find_telling_phrases(captions, shows)
    # The word that both have tells best, and then what is left of each.
    assert [(one.phrase, one.shown, one.others) for one in found] == [
        ("acme", 150, 1),
        ("with the", 100, 0),
        ("logo", 100, 0),
    ]
    assert len(find_telling_phrases(captions, shows, most=1)) == 1


@pytest.mark.parametrize(("count", "told"), [(4, []), (5, ["by acme"])])
def test_what_fewer_than_five_captions_have_is_not_counted(count, told):
    """Of five, one in ten thousand data sets would have by chance what these have; of four, few more."""
    captions = [f"{OBJECTS[number % 10]}{' by Acme' if number < count else ''}" for number in range(2000)]
    found = find_telling_phrases(captions, [number < count for number in range(2000)])
    assert [one.phrase for one in found] == told


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_what_is_as_frequent_elsewhere_names_nothing_but_in_one_of_a_hundred_data_sets(share):
    told = 0
    for seed in range(200):
        draw = random.Random(seed)
        told += bool(find_telling_phrases(captions_of(60, seed), [draw.random() < share for _ in range(60)]))
    assert told <= 2


@pytest.mark.parametrize("shows", [[True] * 40, [False] * 40, [number >= 20 for number in range(40)]])
def test_nothing_is_told_without_others_or_by_what_the_others_have(shows):
    captions = ["a cup with the Acme logo" if number < 20 else "a cup" for number in range(40)]
    assert find_telling_phrases(captions, shows) == []


@pytest.mark.parametrize("captions", [[], ["", ""], [" ,.;", "\n"]])
def test_captions_without_words(captions):
    assert find_telling_phrases(captions, [bool(number % 2) for number in range(len(captions))]) == []
