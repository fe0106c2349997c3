"""Budget, schedule, selection and surgery: the pruner, policy by policy and without a language model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dynlora_cli import plugins
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.lora.start import plan_start
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.pruning.control import RankControl
from dynlora_cli.pruning.schedule import Schedule
from dynlora_cli.pruning.select import select_K
from dynlora_cli.pruning.signals import EntryAverages, GateGradients

from toy import SHAPES, fill, make, train

POLICIES = [n for n in plugins.names("policies") if not plugins.declared("policies", n, "after_training_only")]


def budget(kind, value):
    return SimpleNamespace(kind=kind, value=value)


class TestStart:
    def test_auto_is_twice_the_budget_and_never_above_half_the_smaller_side(self):
        start = plan_start({"big": (100, 200), "small": (10, 300)}, budget("rank", 4), "auto")
        assert start.counts == {"big": 8, "small": 5}
        assert start.parameters == 8 * 300 + 5 * 310
        assert start.budget == 4 * 610
        assert start.average_rank == 4

    def test_share_is_of_the_start(self):
        start = plan_start({"l": (100, 100)}, budget("share", 0.5), "auto")
        assert (start.counts["l"], start.parameters, start.budget) == (32, 6400, 3200)

    def test_parameter_count(self):
        start = plan_start({"l": (100, 100), "m": (100, 100)}, budget("parameters", 1000), "auto")
        assert start.budget == 1000
        assert start.average_rank == 2.5
        assert start.counts == {"l": 5, "m": 5}

    def test_init_equal_to_the_budget_prunes_nothing(self):
        start = plan_start(SHAPES, budget("rank", 3), 3)
        schedule = Schedule.plan(
            total_steps=100, start=0.05, end=0.25, events="auto", parameters=start.parameters, budget=start.budget
        )
        assert (start.parameters, schedule.steps, schedule.last) == (start.budget, (), 0)

    def test_budget_below_one_component_is_a_clear_error(self):
        with pytest.raises(UsageError, match=r"allows 20 parameters.*up to 32"):
            plan_start(SHAPES, budget("parameters", 20), "auto")


class TestSelection:
    def test_one_threshold_over_the_whole_pool(self):
        scores = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0, 6.0])
        costs, layers = torch.full((6,), 10), torch.tensor([0, 0, 0, 1, 1, 2])
        keep, threshold = select_K(scores, costs, layers, 30, capped=False)
        assert keep.tolist() == [True, False, True, False, False, True]
        assert threshold == 3.0

    def test_a_layer_may_end_with_nothing(self):
        scores = torch.tensor([9.0, 8.0, 1.0, 2.0])
        keep, _ = select_K(scores, torch.full((4,), 10), torch.tensor([0, 0, 1, 1]), 20, capped=False)
        assert keep.tolist() == [True, True, False, False]

    def test_cap_takes_a_quarter_of_a_layer_at_most(self):
        scores = torch.cat([torch.arange(9.0), 100 + torch.arange(4.0)])
        layers = torch.tensor([0] * 9 + [1] * 4)
        keep, _ = select_K(scores, torch.ones(13, dtype=torch.long), layers, 2, capped=True)
        assert keep[:9].tolist() == [False] * 3 + [True] * 6
        assert keep[9:].tolist() == [False] + [True] * 3

    @pytest.mark.parametrize("target", [0, 1, 9, 10, 11, 25, 59, 60, 61, 1000])
    def test_boundaries(self, target):
        costs = torch.tensor([10, 10, 10, 15, 15])
        keep, _ = select_K(torch.tensor([1.0, 5, 2, 4, 3]), costs, torch.tensor([0, 0, 0, 1, 1]), target, capped=False)
        left = costs[keep].sum().item()
        assert keep.any()
        assert left <= max(target, 10)
        assert keep.all() == (target >= 60)

    def test_the_last_component_stays_and_is_the_best(self):
        keep, _ = select_K(torch.tensor([1.0, 9.0]), torch.tensor([10, 10]), torch.tensor([0, 1]), 0, capped=False)
        assert keep.tolist() == [False, True]

    def test_equal_scores_fall_on_all_layers_alike(self):
        layers = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
        keep, _ = select_K(torch.zeros(12), torch.ones(12, dtype=torch.long), layers, 6, capped=False)
        assert [keep[layers == layer].tolist() for layer in range(3)] == [[True, True, False, False]] * 3

    def test_random_inputs_never_exceed_the_target(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            n = int(torch.randint(1, 40, (1,), generator=generator))
            layers = torch.randint(0, 5, (n,), generator=generator).sort().values
            costs = torch.randint(1, 9, (5,), generator=generator)[layers]
            target = int(torch.randint(int(costs.max()), int(costs.sum()) + 2, (1,), generator=generator))
            keep, _ = select_K(torch.rand(n, generator=generator), costs, layers, target, capped=False)
            assert keep.any()
            assert costs[keep].sum() <= target


class TestSurgery:
    def test_survivors_keep_values_and_moments(self):
        net, pool = make()
        optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
        train(net, pool, optimizer)
        keep = torch.tensor([True, False, True, True, False, True, True, True, False])
        before = [(layer.a_CI.detach().clone(), layer.b_OC.detach().clone()) for layer in net.layers().values()]
        moments = [tuple(x.clone() for x in pair) for pair in pool.views(optimizer.state[pool.values]["exp_avg"])]
        step = optimizer.state[pool.values]["step"].item()
        shrink(pool, optimizer, keep)
        assert pool.counts == {"up": 3, "gate": 2, "down": 1}
        assert pool.parameters == 3 * 32 + 2 * 32 + 28 == pool.values.numel() == pool.values.grad.numel()
        state = optimizer.state[pool.values]
        assert set(optimizer.state) == {pool.values}
        assert state["step"].item() == step
        rows = zip(
            net.layers().values(), before, moments, pool.views(state["exp_avg"]), keep.split([4, 3, 2]), strict=True
        )
        for layer, (a, b), (m_a, m_b), (new_m_a, new_m_b), kept in rows:
            assert torch.equal(layer.a_CI, a[kept])
            assert torch.equal(layer.b_OC, b[:, kept])
            assert torch.equal(new_m_a, m_a[kept])
            assert torch.equal(new_m_b, m_b[:, kept])

    def test_survivors_go_on_training_in_the_optimizer_and_the_group(self):
        net, pool = make()
        head = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([{"params": [head]}, {"params": [pool.values], "lr": 1e-2}])
        train(net, pool, optimizer)
        shrink(pool, optimizer, torch.tensor([True, False, True] * 3))
        assert optimizer.param_groups[1]["params"][0] is pool.values
        assert optimizer.param_groups[0]["params"][0] is head
        before, seen = pool.values.detach().clone(), net.up.a_CI.detach().clone()
        train(net, pool, optimizer)
        assert not torch.equal(pool.values, before)
        assert not torch.equal(net.up.a_CI, seen), "the module computes with the tensor that the optimizer steps"

    def test_pruned_training_equals_training_that_started_with_the_survivors(self):
        net, pool = make()
        optimizer = torch.optim.SGD([pool.values], lr=0.1)
        fill(pool)
        shrink(pool, optimizer, torch.tensor([True, True, False, False, True, False, True, False, True]))
        small, small_pool = make(counts=(2, 2, 1))
        small_pool.values.data.copy_(pool.values)
        assert train(net, pool, optimizer, 5) == train(
            small, small_pool, torch.optim.SGD([small_pool.values], lr=0.1), 5
        )

    def test_refused_while_an_old_graph_is_alive(self):
        net, pool = make()
        optimizer = torch.optim.AdamW([pool.values])
        loss = net(torch.randn(2, 12)).sum()
        with pytest.raises(DynloraError, match="alive"):
            shrink(pool, optimizer, torch.tensor([False] + [True] * 8))
        assert pool.components == 9
        loss.backward()

    def test_a_layer_emptied_to_zero(self):
        net, pool = make()
        optimizer = torch.optim.AdamW([pool.values])
        train(net, pool, optimizer)
        shrink(pool, optimizer, torch.tensor([True] * 4 + [False] * 3 + [True] * 2))
        assert net.gate.count == 0
        assert torch.equal(net.gate(torch.ones(1, 12)), net.gate.base(torch.ones(1, 12)))
        assert len(train(net, pool, optimizer)) == 3


def controlled(policy="fisher", *, steps=40, target=100, seed=0, lr=1e-2, gauge=True, **kwargs):
    """Train the toy network under rank control; returns network, pool and the events."""
    net, pool = make()
    optimizer = torch.optim.AdamW([pool.values], lr=lr)
    schedule = Schedule.plan(total_steps=steps, start=0.1, end=0.8, events=4, parameters=pool.parameters, budget=target)
    policy = plugins.load("policies", policy)
    control = RankControl(pool, optimizer, policy, schedule, seed=seed, gauge=gauge, **kwargs)
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(64, 12, generator=generator), torch.randn(64, 8, generator=generator)
    events = []
    for step in range(1, steps + 1):
        F.mse_loss(net(x), y).backward()
        control.observe(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        event = control.apply(step)
        if event:
            events.append(event)
    return SimpleNamespace(net=net, pool=pool, events=events, control=control, optimizer=optimizer)


class TestControl:
    @pytest.mark.parametrize("gauge", [True, False])
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("target", [32, 60, 100, 279])
    def test_every_policy_ends_at_or_below_the_budget_as_reported(self, policy, target, gauge):
        run = controlled(policy, target=target, gauge=gauge)
        alive = sum(p.numel() for layer in run.net.layers().values() for p in (layer.a_CI, layer.b_OC))
        assert run.control.budget_met
        assert 0 < alive == run.pool.parameters == run.events[-1]["parameters"] <= target
        assert {name: layer.count for name, layer in run.net.layers().items()} == run.events[-1]["ranks"]

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_removed_component_never_comes_back(self, policy):
        run = controlled(policy)
        counts = [event["components"] for event in run.events]
        assert counts == sorted(counts, reverse=True)
        after = run.pool.components
        train(run.net, run.pool, run.optimizer, steps=10)
        assert run.pool.components == after == sum(layer.a_CI.shape[0] for layer in run.net.layers().values())

    @pytest.mark.parametrize("policy", POLICIES)
    def test_one_seed_gives_the_same_events(self, policy):
        def strip(events):
            return [{k: v for k, v in event.items() if k != "seconds"} for event in events]

        assert strip(controlled(policy).events) == strip(controlled(policy).events)

    def test_another_seed_of_random_gives_others(self):
        first, second = (controlled("random", seed=seed, target=200).events for seed in (1, 2))
        assert [event["ranks"] for event in first] != [event["ranks"] for event in second]

    def test_cap_holds_at_every_event_but_the_last(self):
        run = controlled(target=32)
        before = {"up": 4, "gate": 3, "down": 2}
        for event in run.events[:-1]:
            if event["event"] == "prune":
                assert all(n <= max(1, -(-before[name] // 4)) for name, n in event["removed"].items())
            before = event["ranks"]

    def test_learning_rate_follows_what_is_alive(self):
        run = controlled(target=140, lr_coupling=0.5)
        assert run.control.rate_factor == pytest.approx((280 / run.pool.parameters) ** 0.5)
        assert run.control.rate_factor >= 2**0.5
        assert controlled(lr_coupling=0.0).control.rate_factor == 1.0

    def test_events_carry_predicted_and_measured_change(self):
        net, pool = make(dtype=torch.float64)
        fill(pool)
        optimizer = torch.optim.SGD([pool.values], lr=0.0)
        x, y = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)

        def loss_now():
            with torch.no_grad():
                return F.mse_loss(net(x), y).item()

        schedule = Schedule.plan(total_steps=10, start=0.0, end=1.0, events=1, parameters=280, budget=250)
        policy = plugins.load("policies", "fisher")
        control = RankControl(pool, optimizer, policy, schedule, gauge=False, loss_now=loss_now)
        before = loss_now()
        for step in range(1, 11):
            F.mse_loss(net(x), y).backward()
            control.observe(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            event = control.apply(step)
        assert event["measured_loss_change"] == pytest.approx(loss_now() - before)
        assert event["predicted_loss_change"] == pytest.approx(event["measured_loss_change"], abs=0.25)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_state_goes_on_as_if_never_stopped(self, policy):
        run = controlled(policy, seed=1)
        train(run.net, run.pool, run.optimizer, steps=1)
        for seed in range(3):
            run.pool.values.grad.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
            for observer in run.control.observers:
                observer.observe(run.pool, targets=10)
        other = RankControl(run.pool, run.optimizer, run.control.policy, run.control.schedule, seed=99)
        other.load_state_dict({key: value.clone() for key, value in run.control.state_dict().items()})
        ours, theirs = (c.scores_K() for c in (run.control, other))
        assert torch.equal(ours, theirs)
        assert (other.gradients.steps, other.gradients.targets) == (3, 10)
        assert other.rate_factor == run.control.rate_factor

    def test_names_in_checkpoints_are_those_of_version_0_1(self):
        always = {"generator", "start_parameters", "survivors", "brake"}
        always |= {"gradients.mean", "gradients.square", "gradients.counters"}
        for policy in POLICIES:
            run = controlled(policy, seed=1)
            for observer in run.control.observers:
                observer.observe(run.pool, targets=10)
            own = {"entries.importance", "entries.uncertainty"} if policy == "sensitivity" else set()
            assert run.control.state_dict().keys() == always | own


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                self.size = max(self.size, tensor.numel())
        return out


class TestEightDefectsOfTheFirstPublishedRank1SumCode:
    """The faults listed for the first public rank-1-sum LoRA scripts; none may appear here."""

    def test_1_a_strong_negative_component_is_not_pruned(self):
        _, pool = make()
        fill(pool)
        policy = plugins.load("policies", "magnitude")
        before = policy.scores(pool, None, torch.Generator())
        for _, b in pool.views(pool.values.detach()):
            b[:, 0] *= -1
        assert torch.equal(policy.scores(pool, None, torch.Generator()), before)

    def test_2_a_pruned_component_does_not_revive_through_momentum(self):
        run = controlled("magnitude")
        counts = dict(run.pool.counts)
        train(run.net, run.pool, run.optimizer, steps=20)
        assert run.pool.counts == counts
        assert run.optimizer.state[run.pool.values]["exp_avg"].numel() == run.pool.parameters

    def test_3_no_tensor_of_batch_by_rank_by_output(self):
        net, pool = make(counts=(4, 3, 2))
        fill(pool)
        tokens = 1000
        with _Largest() as largest:
            net(torch.randn(tokens, 12)).sum().backward()
        assert largest.size <= tokens * 20, "nothing larger than the activations themselves"

    def test_4_base_path_is_the_base_layers_own(self):
        net, _ = make()
        x = torch.randn(3, 12)
        assert torch.equal(net.up(x), F.linear(x, net.up.base.weight, net.up.base.bias))

    def test_6_pruning_does_not_wait_for_the_learning_rate(self):
        assert controlled(lr=1e-9, target=32).pool.parameters <= 32

    def test_7_the_start_is_a_no_op_with_a_gradient(self):
        net, pool = make()
        x = torch.randn(3, 12)
        assert torch.equal(net.up(x), net.up.base(x))
        net(x).square().sum().backward()
        assert all(b_grad.abs().max() > 0 for _, b_grad in pool.views(pool.values.grad))

    def test_8_gradients_decide(self):
        """Two components of equal size; the loss feels only one of them."""
        net, pool = make(counts=(2, 1, 1))
        fill(pool)
        with torch.no_grad():
            net.up.a_CI[1] = net.up.a_CI[0]
            net.up.b_OC[:10, 0], net.up.b_OC[10:, 0] = 1.0, 0.0
            net.up.b_OC[:10, 1], net.up.b_OC[10:, 1] = 0.0, 1.0
        gradients = GateGradients()
        for seed in range(5):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
            net.up(x)[:, :10].square().sum().backward()
            gradients.observe(pool, targets=8)
            pool.values.grad.zero_()
        scores = plugins.load("policies", "fisher").scores(pool, gradients, torch.Generator())
        assert scores[0] > 0
        assert scores[1] == 0


class TestPoliciesByTheirEquations:
    def test_squeeze_leaves_every_layer_the_same_rank_and_its_largest(self):
        _, pool = make((4, 4, 4))
        fill(pool)
        sizes = pool.magnitudes_K().split([4, 4, 4])
        scores = plugins.load("policies", "squeeze").scores(pool, None, torch.Generator())
        target = 2 * sum(pool.cost(name) for name in pool.layers)
        keep, _ = select_K(scores, pool.costs_K(), pool.layers_K(), target, capped=False)
        for kept, size in zip(keep.split([4, 4, 4]), sizes, strict=True):
            assert set(kept.nonzero().flatten().tolist()) == set(size.topk(2).indices.tolist())

    def test_sensitivity_is_adaloras_score(self):
        """Against PEFT's own allocator, on the same values and gradients."""
        from peft.tuners.adalora.layer import RankAllocator

        _, pool = make((4, 3, 2))
        fill(pool)
        entries, config = EntryAverages(), SimpleNamespace(beta1=0.85, beta2=0.85, init_r=4, target_r=2)
        theirs = RankAllocator.__new__(RankAllocator)
        theirs.beta1, theirs.beta2, theirs.peft_config, theirs.adapter_name = 0.85, 0.85, config, "default"
        theirs.ipt, theirs.exp_avg_ipt, theirs.exp_avg_unc = {}, {}, {}
        named = {}
        for name, layer in pool.layers.items():
            named |= {f"{name}.lora_A.default": layer.a_CI, f"{name}.lora_B.default": layer.b_OC}
        model = SimpleNamespace(named_parameters=named.items)
        for seed in range(3):
            pool.values.grad.copy_(torch.randn(pool.parameters, generator=torch.Generator().manual_seed(seed)))
            entries.observe(pool, targets=1)
            theirs.update_ipt(model)
        found = plugins.load("policies", "sensitivity").scores(pool, entries, torch.Generator())
        expected = []
        for name in pool.layers:
            a, b = (theirs._element_score(f"{name}.lora_{part}.default") for part in "AB")
            expected.append(a.mean(1) + b.mean(0))
        torch.testing.assert_close(found, torch.cat(expected))
