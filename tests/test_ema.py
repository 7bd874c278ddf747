""" components/ema.py: the averages follow their formula, and go into the model and out again. """
import pytest
import torch

from components.ema import EMA


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def change(model):
    """ Adds random numbers to the parameters, as an update would. """
    for p in model.parameters():
        p.add_(torch.randn_like(p))


def test_averages_begin_with_the_weights(tiny):
    torch.testing.assert_close(EMA(tiny, 0.9).averages, copies(tiny), rtol=0, atol=0)


def test_averages_follow_the_formula(tiny):
    ema = EMA(tiny, 0.5)
    expected = copies(tiny)
    for iter_num in range(20):
        change(tiny)
        ema.update(iter_num)
        decay = min(0.5, (1 + iter_num) / (10 + iter_num))
        for name, p in tiny.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    torch.testing.assert_close(ema.averages, expected)


def test_model_has_the_averages_within_the_block(tiny):
    ema = EMA(tiny, 0.9)
    averages = copies(tiny)
    change(tiny)
    weights = copies(tiny)
    with ema.applied():
        torch.testing.assert_close(copies(tiny), averages, rtol=0, atol=0)
        assert tiny.lm_head.weight is tiny.transformer.wte.weight  # still tied
    torch.testing.assert_close(copies(tiny), weights, rtol=0, atol=0)
    torch.testing.assert_close(ema.averages, averages, rtol=0, atol=0)


def test_weights_after_an_error(tiny):
    ema = EMA(tiny, 0.9)
    change(tiny)
    weights = copies(tiny)
    with pytest.raises(KeyboardInterrupt), ema.applied():
        raise KeyboardInterrupt
    torch.testing.assert_close(copies(tiny), weights, rtol=0, atol=0)


def test_no_average(tiny):
    ema = EMA(tiny, 0.0)
    change(tiny)
    weights = copies(tiny)
    ema.update(0)
    with ema.applied():
        torch.testing.assert_close(copies(tiny), weights, rtol=0, atol=0)
    assert ema.averages == {}


@pytest.mark.parametrize('decay', [0.0, 0.9])
def test_update_does_not_change_the_model(tiny, decay):
    ema = EMA(tiny, decay)
    change(tiny)
    weights = copies(tiny)
    ema.update(100)
    torch.testing.assert_close(copies(tiny), weights, rtol=0, atol=0)
