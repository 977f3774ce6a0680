"""Muon beside torch's own, which takes one matrix after another in bfloat16, and what its step must allow."""

import copy
import itertools

import pytest
import torch
from torch import nn

from unmask.training.muon import Deal, Muon, orthogonal

SHAPES = [(16, 24), (24, 16), (24, 16), (8, 24), (24, 24)]


def network():
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(0.1 * torch.randn(shape)) for shape in [*SHAPES, (24,)]])


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def muon(parameters, rate):
    return Muon(list(parameters)[:-1], list(parameters)[-1:], lr=rate, weight_decay=0.01, fused=True)


@pytest.mark.parametrize("decay", [0.1, 0.0, 2.0])
def test_updates_are_those_of_torch(decay):
    ours, theirs = network(), network()
    pair = [Muon(list(ours)[:-1], list(ours)[-1:], matrix_decay=decay, lr=0.02, weight_decay=0.01, fused=True)]
    of_torch = [
        torch.optim.Muon(list(theirs)[:-1], lr=0.02, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(list(theirs)[-1:], lr=0.02, weight_decay=0.01, fused=True),
    ]
    for step in range(4):
        for parameters, optimizers in ((ours, pair), (theirs, of_torch)):
            set_gradients(parameters, step)
            for optimizer in optimizers:
                optimizer.step()
    for before, mine, other in zip(network(), ours, theirs, strict=True):
        assert (mine - other).norm() < 0.03 * (other - before).norm()
    assert torch.equal(ours[-1], theirs[-1])


@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (12, 40), (30, 30)])
def test_singular_values_are_about_one(rows, columns):
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, rows, columns)))
    assert values.max() < 1.25
    # Those that begin near zero take more rounds; none shrinks.
    assert values.median() > 0.65


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonal(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def test_a_rate_that_is_a_tensor_is_read_at_each_step():
    ours, other = network(), network()
    rate = torch.tensor(0.5)
    with_tensor = Muon(list(ours)[:-1], list(ours)[-1:], lr=rate, fused=True, capturable=True)
    with_number = Muon(list(other)[:-1], list(other)[-1:], lr=0.5, fused=True)
    for step, value in enumerate((0.5, 0.01)):
        rate.fill_(value)
        with_number.param_groups[0]["lr"] = with_number.param_groups[1]["lr"] = value
        for parameters, optimizer in ((ours, with_tensor), (other, with_number)):
            set_gradients(parameters, step)
            optimizer.step()
    for mine, theirs in zip(ours, other, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_matrices_decay_by_the_papers_constant_unless_told_otherwise():
    after = []
    for options in ({}, {"matrix_decay": 0.1}, {"matrix_decay": 0.0}):
        parameters = network()
        set_gradients(parameters, 0)
        Muon(list(parameters)[:-1], list(parameters)[-1:], lr=0.02, fused=True, **options).step()
        after.append(list(parameters))
    for told, default, without, start in zip(after[1], after[0], after[2], network(), strict=True):
        assert torch.equal(told, default)
        if start.ndim == 2:
            torch.testing.assert_close(without - default, 0.02 * 0.1 * start)
        else:
            assert torch.equal(without, default)


def test_a_loaded_state_goes_on_bit_for_bit():
    unbroken = network()
    optimizer = muon(unbroken, 0.02)
    saved = None
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy((unbroken.state_dict(), optimizer.state_dict()))
        set_gradients(unbroken, step)
        optimizer.step()
    resumed = network()
    resumed.load_state_dict(saved[0])
    again = muon(resumed, 0.02)
    again.load_state_dict(saved[1])
    for step in (2, 3):
        set_gradients(resumed, step)
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(unbroken, resumed, strict=True))


@pytest.mark.parametrize(("world_size", "count", "first"), [(1, 3, 0), (2, 5, 0), (3, 7, 4), (4, 2, 3)])
def test_ranks_have_all_of_what_they_share_out(world_size, count, first):
    torch.manual_seed(2)
    matrices = torch.randn(count, 6, 10)
    made = torch.stack([Deal(rank, world_size).orthogonal(matrices, first) for rank in range(world_size)])
    by_rank = [[(first + number) % world_size == rank for number in range(count)] for rank in range(world_size)]
    assert made.flatten(2).any(2).tolist() == by_rank
    torch.testing.assert_close(made.sum(0), orthogonal(matrices))


def test_parameters_without_a_gradient_stay():
    parameters = network()
    before = [p.detach().clone() for p in parameters]
    set_gradients([parameters[1]], 0)
    muon(parameters, 0.02).step()
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert moved == [index == 1 for index in range(len(moved))]


def test_only_matrices_are_taken():
    vector = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="only matrices"):
        Muon([vector], [])
    assert list(itertools.chain(*(g["params"] for g in Muon([], [vector]).param_groups))) == [vector]
