"""Finding the concept in pictures that nobody has labelled."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from peft_gradproj.errors import ConceptDataError
from peft_gradproj.masks import ConceptMarker, _spread, fit_markers, guarded, mark_concept, mark_missed, places

PATTERN = torch.tensor([[3.0, -3.0, 3.0], [-3.0, 3.0, -3.0], [3.0, -3.0, 3.0]])


def paste(latents, generator):
    """Paste the pattern into each; returns the results and where it is."""
    latents, masks = latents.clone(), torch.zeros(len(latents), 1, *latents.shape[2:])
    for latent, mask in zip(latents, masks, strict=True):
        top, left = torch.randint(0, latent.shape[-1] - 2, (2,), generator=generator).tolist()
        latent[:, top : top + 3, left : left + 3] = PATTERN
        mask[:, top : top + 3, left : left + 3] = 1
    return latents, masks


@pytest.fixture(scope="module")
def pictures():
    """User's pictures, three quarters of which hold the pattern, and where it is."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(96, 2, 12, 12, generator=generator)
    stamped, masks = paste(latents, generator)
    clean = torch.arange(96) % 4 == 0
    stamped[clean], masks[clean] = latents[clean], 0
    return stamped, masks, generator


def test_what_was_pasted_teaches_to_find_what_was_there_before(pictures):
    latents, masks, generator = pictures
    folds = [torch.arange(48), torch.arange(48, 96)]
    pasted = [paste(latents[fold].repeat(4, 1, 1, 1), generator) for fold in folds]
    found_masks = mark_concept(latents, pasted, folds, dilation=0, steps=150)
    assert found_masks.shape == masks.shape
    assert set(found_masks.unique().tolist()) <= {0.0, 1.0}
    found, there = found_masks.bool(), masks.bool()
    assert (found & there).sum() > 0.9 * there.sum()
    assert (found & ~there).sum() < 0.01 * (~there).sum()

    wider = mark_concept(latents, pasted, folds, dilation=1, steps=150)
    assert (wider >= found_masks).all()
    assert wider.sum() > found_masks.sum()


def test_each_fold_is_marked_by_the_network_of_its_pasted_set_fitted_with_the_same_options(pictures):
    latents, _, generator = pictures
    folds = [torch.arange(96)[half::2] for half in range(2)]
    pasted = [paste(latents[fold], generator) for fold in folds]
    found = {}
    for crop in (0.5, 1.0):
        options = {"steps": 20, "crop": crop, "seed": 3}
        found[crop] = mark_concept(latents, pasted, folds, dilation=0, **options)
        for fold, marker in zip(folds, fit_markers(pasted, **options), strict=True):
            assert torch.equal(found[crop][fold], marker.mark(latents[fold], dilation=0))
    assert not torch.equal(found[0.5], found[1.0])


def test_the_labelled_share_is_what_was_pasted_of_all_that_is_there():
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(640, 2, 12, 12, generator=generator)
    latents[::2], _ = paste(latents[::2], generator)
    with_concept, masks = paste(latents, generator)
    marker = ConceptMarker.fit(with_concept, masks, steps=150)
    # Each picture has one pattern that was pasted, half of them another, which may lie under it: a little over 2 / 3.
    assert marker.labelled_share == pytest.approx(0.7, abs=0.1)


def test_the_same_seed_gives_the_same_marks_and_leaves_the_global_generator_alone(pictures):
    latents, _, _ = pictures
    with_concept, masks = paste(latents, torch.Generator().manual_seed(1))
    markers = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        markers.append(ConceptMarker.fit(with_concept, masks, steps=5, seed=3))
        assert torch.equal(before, torch.get_rng_state())
    one, again = (marker.network(latents) for marker in markers)
    assert torch.equal(one, again)


def test_a_network_never_marks_a_picture_that_it_learned_from(pictures, monkeypatch):
    latents, _, generator = pictures
    folds = [torch.arange(96)[start::3] for start in range(3)]
    # A picture of fold k holds k, so that it is seen which were learned from.
    latents = torch.zeros_like(latents)
    for number, fold in enumerate(folds):
        latents[fold] = float(number)
    pasted = [(latents[fold], paste(latents[fold], generator)[1]) for fold in folds]
    learned, fit = [], ConceptMarker.fit.__func__

    def remember(cls, seen, *args, **kwargs):
        learned.append(set(seen.unique().tolist()))
        return fit(cls, seen, *args, **kwargs)

    monkeypatch.setattr(ConceptMarker, "fit", classmethod(remember))
    mark_concept(latents, pasted, folds, steps=1)
    assert learned == [{1.0, 2.0}, {0.0, 2.0}, {0.0, 1.0}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
def test_a_second_look_gives_masks_of_the_dtype_that_it_was_given(pictures, dtype):
    latents, masks, _ = pictures
    given_masks = masks.clone()
    given_masks[::5] = 0
    folds = [torch.arange(96)[half::2] for half in range(2)]
    completed = mark_missed(latents, given_masks.to(dtype), folds, steps=2)
    assert (completed.dtype, completed.shape) == (dtype, masks.shape)
    assert torch.equal(completed, mark_missed(latents, given_masks, folds, steps=2).to(dtype))


def test_a_second_look_finds_what_was_missed_wherever_it_lies(pictures):
    latents, masks, _ = pictures
    shows = masks.flatten(1).any(1)
    missed = shows & (torch.rand(96, generator=torch.Generator().manual_seed(4)) < 0.3)
    given_masks = masks.clone()
    given_masks[missed] = 0
    folds = [torch.arange(96)[half::2] for half in range(2)]
    progress = []
    options = {"steps": 150, "seed": 1, "progress": progress.append}
    completed = mark_missed(latents, given_masks, folds, **options)
    assert (completed.dtype, completed.shape) == (torch.float32, masks.shape)
    assert progress == [*range(1, 301)]
    marked = shows & ~missed
    assert torch.equal(completed[marked], given_masks[marked])
    found, there = completed.bool(), masks.bool()
    assert missed.sum() > 10
    assert (found & there)[missed].sum() > 0.8 * there[missed].sum()
    assert found[~shows].float().mean() < 0.01
    assert (found & ~there)[missed].float().mean() < 0.01

    wider = mark_missed(latents, given_masks, folds, dilation=1, steps=150, seed=1)
    assert torch.equal(wider[marked], given_masks[marked])
    assert (wider[missed].bool() >= found[missed]).all()
    assert wider[missed].sum() > found[missed].sum()


def test_pictures_are_not_looked_at_by_a_network_that_learned_from_their_marks(pictures, monkeypatch):
    latents, masks, _ = pictures
    folds = [torch.arange(96)[half::2] for half in range(2)]
    learned, fit = [], ConceptMarker.fit.__func__

    def remember(cls, seen, labels, **kwargs):
        assert all(torch.equal(label, masks[row]) for row, label in zip(rows_of(seen), labels, strict=True))
        learned.append(sorted(rows_of(seen)))
        return fit(cls, seen, labels, **kwargs)

    def rows_of(seen):
        return [int((latents == one).flatten(1).all(1).nonzero()) for one in seen]

    monkeypatch.setattr(ConceptMarker, "fit", classmethod(remember))
    mark_missed(latents, masks, folds, steps=1)
    assert learned == [fold.tolist() for fold in reversed(folds)]


def test_marks_that_are_all_among_the_first_pictures_can_be_learned_from(pictures):
    """An eighth of the pictures, the last, is held out."""
    latents, masks, _ = pictures
    order = masks.flatten(1).any(1).float().argsort(descending=True, stable=True)
    latents, masks = latents[order], masks[order]
    masks[40:] = 0
    folds = [torch.arange(96)[half::2] for half in range(2)]
    completed = mark_missed(latents, masks, folds, steps=1)
    assert torch.equal(completed[:40], masks[:40])


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 8))
@example([True] * 20 + [False] * 40, 4)
@example([False] * 30 + [True] * 30, 8)
def test_any_part_of_the_spread_order_has_its_share_of_the_marked(marked, parts):
    marked = torch.tensor(marked)
    order = _spread(marked)
    assert sorted(order.tolist()) == [*range(len(marked))]
    count = len(marked) // parts
    for start in range(len(marked) - count + 1):
        shown = int(marked[order[start : start + count]].sum())
        assert abs(shown - count * float(marked.float().mean())) <= 2


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 6), st.integers(0, 6))
def test_places_of_one_mark_are_its_own(height, width, top, left):
    side = 10
    top, left = min(top, side - height), min(left, side - width)
    masks = torch.zeros(3, 1, side, side)
    masks[1, :, top : top + height, left : left + width] = 1
    across, down = places(masks)
    assert across == pytest.approx((left / (side - width),) * 2)
    assert down == pytest.approx((top / (side - height),) * 2)


def test_places_hold_those_of_nearly_all_marks():
    masks = torch.zeros(40, 1, 8, 8)
    for number in range(40):
        masks[number, :, 6, number % 4] = 1
    (left, right), (top, bottom) = places(masks)
    assert (left, right) == pytest.approx((0, 3 / 7))
    assert (top, bottom) == pytest.approx((6 / 7, 6 / 7))


def test_a_mark_that_fills_the_picture_lies_at_its_edge_and_not_nowhere():
    assert places(torch.ones(2, 1, 4, 4)) == ((0.0, 0.0), (0.0, 0.0))


def test_bad_input_is_named():
    latents, masks = torch.randn(32, 4, 8, 8), torch.ones(32, 1, 8, 8)
    with pytest.raises(ConceptDataError, match="at least 16"):
        ConceptMarker.fit(latents[:15], masks[:15])
    with pytest.raises(ConceptDataError, match=r"\(32, 1, 8, 8\)"):
        ConceptMarker.fit(latents, masks[..., :4])
    with pytest.raises(ConceptDataError, match="pasted nowhere"):
        ConceptMarker.fit(latents, torch.zeros_like(masks))
    with pytest.raises(ConceptDataError, match="at least two"):
        mark_concept(latents, [(latents, masks)], [torch.arange(32)])
    with pytest.raises(ConceptDataError, match="each once"):
        mark_concept(latents, [(latents, masks)] * 2, [torch.arange(16), torch.arange(15, 32)])
    with pytest.raises(ConceptDataError, match="the masks are empty"):
        mark_missed(latents, torch.zeros_like(masks), [torch.arange(16), torch.arange(16, 32)])
    with pytest.raises(ConceptDataError, match="none of the training pictures"):
        places(torch.zeros(2, 1, 4, 4))


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=n, max_size=n)
    ),
    st.floats(0.01, 1.0),
)
# The share is one of the pictures that show the concept, not of all.
@example([[True] + [False] * 5, [False] * 6], 0.6)
def test_guarded_masks_cover_more_only_where_others_show_the_concept_and_it_was_not_found(rows, share):
    masks = torch.tensor(rows).float().view(-1, 1, 2, 3)
    covered = guarded(masks, share=share)
    assert covered.shape == masks.shape
    shown = masks.sum(0)
    usual = (shown >= share * masks.flatten(1).any(1).sum()) & (shown > 0)
    for before, after in zip(masks.bool(), covered.bool(), strict=True):
        assert torch.equal(after, before if (before & usual).any() else before | usual)
    assert ((covered == 0) | (covered == 1)).all()


def test_guarding_covers_what_was_missed_of_a_concept_that_lies_in_one_place():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(200, 1, 8, 8)
    for mask in masks:
        top, left = torch.randint(4, 6, (2,), generator=generator).tolist()
        mask[:, top : top + 3, left : left + 3] = 1
    found = masks.clone()
    found[::5] = 0
    # What is found elsewhere by mistake does not stand for what was missed.
    for number, mask in enumerate(found[::10]):
        mask[:, number % 8, number // 8] = 1
    covered = guarded(found)
    assert (masks * (1 - covered)).sum() == 0
    assert (covered >= found).all()
    assert covered[::5].mean() < 0.3
