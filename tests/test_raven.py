"Chapter 13's generator, answer sets, codes, reader and floor: known answers, and laws that every matrix must obey."
import itertools, math

import pytest
import torch
from test_ground import script

from minisora.core import generator, num_params


@pytest.fixture(scope="module")
def raven():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISORA_SCALE", "test")
        yield script("study").chapter("13_raven")


def obeys(rule, grid):
    "By the words of the chapter, for one grid of nine, independently of how it lists them."
    rows = [grid[:3], grid[3:6], grid[6:]]
    if rule == "constant": return all(len(set(r)) == 1 for r in rows)
    if rule == "progression": return {(r[1] - r[0], r[2] - r[1]) for r in rows} in ({(1, 1)}, {(-1, -1)})
    columns = [list(c) for c in zip(*rows)]
    return all(len(set(x)) == 3 and set(x) == set(rows[0]) for x in rows + columns)


def test_rules_list_all_grids_and_no_others(raven):
    every = list(itertools.product(range(3), repeat=9))
    for rule in raven.RULES:
        assert sorted(map(tuple, raven.obeying(rule, 3).flatten(1).tolist())) == [g for g in every if obeys(rule, g)]
    assert [len(raven.obeying(rule, 4)) for rule in raven.RULES] == [4**3, 2*2**3, 4*3*2*2]


def test_matrices_obey_their_rules(raven):
    values, rules = raven.matrices(300, generator(0))
    for a in range(4):
        for grid, rule in zip(values[..., a].tolist(), rules[:, a].tolist()): assert obeys(raven.RULES[rule], grid)
    assert not raven.together(rules).any() and raven.together(raven.matrices(50, generator(1), raven.together)[1]).all()
    assert torch.equal(raven.reason(values[:, :8]), values[:, 8])


@pytest.mark.parametrize("split", ["trained", "together"])
def test_every_ninth_value_and_every_rule_is_as_likely(raven, split):
    values, rules = raven.matrices(20_000, generator(2), getattr(raven, split))
    for a, k in enumerate(raven.COUNTS):
        share = values[:, 8, a].bincount(minlength=k)/len(values)
        assert (share - 1/k).abs().max() < 4*math.sqrt(1/k/len(values))
    for a in (2, 3): assert (rules[:, a].bincount(minlength=3)/len(rules) - 1/3).abs().max() < .015
    pair = (values[:, 8, 0]*raven.COUNTS[1] + values[:, 8, 1]).bincount(minlength=16)/len(values)  # and together, though rules are held out
    assert (pair - 1/16).abs().max() < .008


def test_answer_sets_are_cubes(raven):
    answer = raven.matrices(200, generator(3))[0][:, 8]
    sets, truth = raven.choices(answer, generator(4))
    assert torch.equal(sets[range(200), truth], answer) and truth.bincount(minlength=8).min() > 8
    for s in sets:
        counts = sorted(tuple(sorted(s[:, a].bincount()[s[:, a].unique()].tolist())) for a in range(4))
        assert len(s.unique(dim=0)) == 8 and counts == [(4, 4)]*3 + [(8,)]
    assert raven.majority(sets, truth) == pytest.approx(1/8)
    sets, truth = raven.one_changed(answer, generator(5))
    assert all(len(s.unique(dim=0)) == 8 for s in sets) and ((sets != answer[:, None]).sum(-1) <= 1).all()
    assert raven.majority(sets, truth) > .9


def test_which_corner_is_right_cannot_be_known(raven):
    "Of all ways to make one and the same set of answers, each corner is the right one in an eighth: counted, for all answers and all cubes."
    made = {}
    for answer in itertools.product(*map(range, raven.COUNTS)):
        for three in itertools.combinations(range(4), 3):
            for others in itertools.product(*([v for v in range(raven.COUNTS[a]) if v != answer[a]] for a in three)):
                cube = frozenset(tuple(dict(zip(three, pick)).get(a, answer[a]) for a in range(4)) for pick in itertools.product(*((answer[a], o) for a, o in zip(three, others))))
                weight = 1/math.prod(raven.COUNTS[a] - 1 for a in three)
                made.setdefault(cube, {}).setdefault(answer, []).append(weight)
    for cube, by in made.items():
        assert set(by) == cube and len({round(sum(w), 9) for w in by.values()}) == 1


def test_cells_are_drawn_read_and_coded(raven):
    every = torch.cartesian_prod(*map(torch.arange, raven.COUNTS))
    cells = raven.picture(every, generator(6))
    assert cells.shape == (192, 3, 24, 24) and torch.equal(raven.read_cells(cells), every)
    codes = raven.tokens(cells[:, None])
    assert codes.shape == (192, 5) and (codes[:, 0] == raven.START).all() and torch.allclose(raven.draw(codes[:, 1:])[:, 0], cells, atol=1e-4)
    blank = (cells.unflatten(-1, (2, 12)).unflatten(-3, (2, 12)).amax((1, 3, 5)) < -.99).sum((1, 2))
    assert torch.equal(4 - blank, every[:, 3] + 1)


def test_what_is_no_cell_is_not_read(raven):
    cells = raven.picture(torch.tensor([[0, 0, 2, 3], [1, 0, 2, 3]]), generator(7))
    mixed = torch.cat([cells[0, ..., :12], cells[1, ..., 12:]], -1)  # circles and squares
    assert (raven.read_cells(torch.stack([mixed, torch.full_like(mixed, -1.)])) == -1).all()


def test_layouts_are_equally_likely(raven):
    filled = raven.patches(raven.picture(torch.tensor([[0, 0, 2, 1]]).expand(6000, 4), generator(8))).amax(-1) > -.99
    assert (filled.sum(1) == 2).all()
    share = (filled*torch.tensor([1, 2, 4, 8])).sum(1).bincount()/6000
    assert (share[share > 0] - 1/6).abs().max() < .02 and (share > 0).sum() == 6


def test_floor_agrees_with_counting(raven):
    "In bits: the ninth cell by its layouts, the first by how likely each is, estimated from drawn matrices."
    floor, (values, _) = raven.exact_bits(), raven.matrices(40_000, generator(9))
    assert floor[8].item() == pytest.approx((2 + math.log2(6) + 2 + 0)/4)
    v = values[:, 0]
    p = (((v[:, 0]*4 + v[:, 1])*3 + v[:, 2])*4 + v[:, 3]).bincount(minlength=192)/len(v)
    where = torch.tensor([2, math.log2(6), 2, 0])[v[:, 3]].mean()
    assert floor[0].item() == pytest.approx((-(p[p > 0]*p[p > 0].log2()).sum() + where).item(), abs=.02)


def test_a_point_of_the_study(raven):
    net, point = raven.point("3k", 0)
    assert point["parameters"] == num_params(net) and len(point["bits"]) == 9 and point["flops"] > 0
    again = raven.point("3k", 0)[1]
    assert point == again
    lacking = raven.pool(lambda rules: raven.trained(rules) & (rules[:, 1] != 2))
    assert lacking.shape == (200, raven.BOARD) and lacking.max() <= raven.START


def test_sizes_are_called_by_their_parameters(raven):
    for name, size in raven.SIZES.items():
        n = num_params(raven.GPT(raven.START + 1, *size, raven.BOARD))
        assert n == pytest.approx(float(name[:-1])*{"k": 1e3, "M": 1e6}[name[-1]], rel=.06), (name, n)
