"""When components go, and how many: arithmetic alone."""

from __future__ import annotations

import pytest

from dynlora_cli.pruning.schedule import Schedule


class TestSchedule:
    def plan(self, total_steps=400, start=0.05, end=0.25, events="auto", parameters=4000, budget=1000):
        return Schedule.plan(
            total_steps=total_steps, start=start, end=end, events=events, parameters=parameters, budget=budget
        )

    def test_default_has_one_event_per_ten_steps_and_ends_on_the_budget(self):
        schedule = self.plan()
        assert schedule.begin == 20
        assert schedule.steps == (30, 40, 50, 60, 70, 80, 90, 100)
        assert schedule.targets[-1] == 1000

    def test_targets_fall_like_a_cube(self):
        schedule = self.plan()
        expected = [1000 + int(3000 * (1 - (j + 1) / 8) ** 3) for j in range(8)]
        assert list(schedule.targets) == expected

    def test_at_most_twenty_events(self):
        assert len(self.plan(total_steps=100_000).steps) == 20

    @pytest.mark.parametrize("total_steps", [1, 2])
    def test_a_run_of_a_few_steps_prunes_nothing(self, total_steps):
        assert self.plan(total_steps=total_steps).steps == ()

    @pytest.mark.parametrize("total_steps", [3, 4, 7, 19, 40])
    @pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.05, 0.25), (0.0, 0.01), (0.9, 1.0)])
    @pytest.mark.parametrize("events", ["auto", 1, 5, 1000])
    def test_short_runs_still_meet_the_budget_inside_the_run(self, total_steps, start, end, events):
        schedule = self.plan(total_steps=total_steps, start=start, end=end, events=events)
        assert schedule.steps
        assert all(0 < a < b for a, b in zip(schedule.steps, schedule.steps[1:], strict=False))
        assert schedule.begin < schedule.steps[0]
        assert schedule.last <= total_steps
        assert schedule.targets[-1] == 1000
