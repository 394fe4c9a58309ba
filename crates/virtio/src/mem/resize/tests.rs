// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;

const S: Duration = Duration::from_secs(1);
const BLOCK: u64 = 2 * MIB;

/// A resize and the time.
struct Scene {
    resize: Resize,
    now: Instant,
    plugged: u64,
}

impl Scene {
    /// A driver is ready and `plugged` bytes are plugged, as was asked for.
    fn settled(plugged: u64) -> Scene {
        let now = Instant::now();
        let mut scene = Scene {
            resize: Resize::new(Pacing::default(), plugged, now),
            now,
            plugged: 0,
        };
        scene.resize.driver_ready(now);
        if plugged > 0 {
            scene.request(RequestKind::Plug, 0..plugged, Answer::Ack, plugged);
        }
        let reached = if plugged > 0 {
            vec![Action::Report(Progress::Reached)]
        } else {
            vec![]
        };
        assert_eq!(scene.actions(), reached);
        scene
    }

    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.resize.poll(self.now)).collect()
    }

    fn request(&mut self, kind: RequestKind, range: Range<u64>, answer: Answer, plugged: u64) {
        self.failing(kind, range, answer, None, plugged);
    }

    fn failing(
        &mut self,
        kind: RequestKind,
        range: Range<u64>,
        answer: Answer,
        setback: Option<Setback>,
        plugged: u64,
    ) {
        self.resize.request_begun(self.now);
        self.plugged = plugged;
        let answered = Answered {
            kind,
            range: Some(range),
            answer,
            setback,
            plugged,
        };
        self.resize.request_answered(self.now, &answered);
    }

    fn target(&mut self, bytes: u64) {
        self.resize.target_set(self.now, bytes);
        assert_eq!(self.actions(), [], "the caller interrupts for a new target");
    }

    /// Lets time pass, waking whenever that was asked for; what happened and when.
    fn pass(&mut self, duration: Duration) -> Vec<(Duration, Action)> {
        let (start, end) = (self.now, self.now + duration);
        let mut happened = Vec::new();
        while let Some(at) = self.resize.wake_at().filter(|at| *at <= end) {
            assert!(at >= self.now || self.resize.wake_at() == Some(at));
            self.now = self.now.max(at);
            let actions = self.actions();
            assert!(
                !actions.is_empty(),
                "woken for nothing at {:?}",
                self.now - start
            );
            happened.extend(actions.into_iter().map(|action| (self.now - start, action)));
        }
        self.now = end;
        happened
    }

    fn kicks(happened: &[(Duration, Action)]) -> Vec<u64> {
        let kicks = happened
            .iter()
            .filter(|(_, action)| *action == Action::Kick);
        kicks.map(|(at, _)| at.as_secs()).collect()
    }

    fn reports(happened: &[(Duration, Action)]) -> Vec<(u64, Progress)> {
        let reports = happened.iter().filter_map(|(at, action)| match action {
            Action::Report(progress) => Some((at.as_secs(), *progress)),
            Action::Kick => None,
        });
        reports.collect()
    }
}

#[test]
fn reached_is_reported_once_per_target() {
    let mut scene = Scene::settled(4 * GIB);
    assert_eq!(scene.actions(), []);
    scene.resize.target_set(scene.now, 4 * GIB);
    assert_eq!(scene.actions(), [Action::Report(Progress::Reached)]);
    assert_eq!(scene.resize.wake_at(), None);
    assert_eq!(scene.resize.progress(), Progress::Reached);
}

#[test]
fn a_working_driver_is_left_alone() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(GIB);
    assert_eq!(scene.resize.progress(), Progress::Working);
    for step in 1..=24 {
        // Slow: 1.9 s between two requests.
        assert_eq!(scene.pass(S * 19 / 10), [], "step {step}");
        let plugged = 4 * GIB - step * 128 * MIB;
        scene.request(
            RequestKind::Unplug,
            plugged..plugged + 128 * MIB,
            Answer::Ack,
            plugged,
        );
    }
    assert_eq!(scene.actions(), [Action::Report(Progress::Reached)]);
    assert_eq!(scene.pass(S * 1000), []);
}

#[test]
fn a_request_in_progress_is_never_disturbed() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(0);
    scene.resize.request_begun(scene.now);
    let happened = scene.pass(S * 300);
    assert!(Scene::kicks(&happened).is_empty());
    assert_eq!(
        Scene::reports(&happened),
        [(10, Progress::Stalled(Reason::IoInFlight))]
    );
}

#[test]
fn an_idle_driver_is_told_again_less_and_less_often() {
    let mut scene = Scene::settled(GIB);
    scene.target(4 * GIB);
    let happened = scene.pass(S * 3600);
    let kicks = Scene::kicks(&happened);
    assert_eq!(kicks, [1, 3, 7, 15, 31, 61, 91, 121, 151, 181, 211, 241]);
    let mut scene = Scene::settled(4 * GIB);
    scene.target(GIB);
    let kicks = Scene::kicks(&scene.pass(S * 3600));
    assert_eq!(kicks[..5], [2, 6, 14, 30, 60]);
    assert_eq!(kicks.len(), 12);
}

#[test]
fn progress_starts_the_pauses_anew() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(0);
    assert_eq!(Scene::kicks(&scene.pass(S * 14)), [2, 6, 14]);
    scene.request(RequestKind::Unplug, 3 * GIB..4 * GIB, Answer::Ack, 3 * GIB);
    assert_eq!(Scene::kicks(&scene.pass(S * 7)), [2, 6]);
}

/// A kick makes Linux begin anew, so one that needs 3 s for each step must not be kicked every 2 s.
#[test]
fn a_slow_driver_is_given_the_time_it_needs() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(0);
    let mut kicks = Vec::new();
    for step in 1..=32 {
        let plugged = 4 * GIB - step * 128 * MIB;
        // It works until it is through or kicked.
        let (mut working, mut elapsed) = (Duration::ZERO, Duration::ZERO);
        while working < S * 3 {
            let happened = scene.pass(S / 2);
            elapsed += S / 2;
            let kicked = happened.iter().any(|(_, action)| *action == Action::Kick);
            working = if kicked {
                Duration::ZERO
            } else {
                working + S / 2
            };
            assert!(elapsed < S * 60, "it never gets anything done");
            if kicked {
                kicks.push(step);
            }
        }
        let range = plugged..plugged + 128 * MIB;
        scene.request(RequestKind::Unplug, range, Answer::Ack, plugged);
    }
    assert_eq!(kicks, [1], "once to learn how slow it is");
    // The next driver may be another one.
    scene.resize.driver_gone(scene.now);
    scene.resize.driver_ready(scene.now);
    scene.target(GIB);
    assert_eq!(Scene::kicks(&scene.pass(S * 3)), [1, 3]);
}

#[test]
fn a_failed_request_is_a_sign_of_life_but_no_progress() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(0);
    assert_eq!(Scene::kicks(&scene.pass(S * 3)), [2]);
    scene.failing(
        RequestKind::Unplug,
        3 * GIB..4 * GIB,
        Answer::Busy,
        Some(Setback::IoInFlight),
        4 * GIB,
    );
    assert_eq!(Scene::kicks(&scene.pass(S * 5)), [4]);
}

#[test]
fn unmovable() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(GIB);
    scene.request(RequestKind::Unplug, 3 * GIB..4 * GIB, Answer::Ack, 3 * GIB);
    let happened = scene.pass(S * 60);
    assert_eq!(
        Scene::reports(&happened),
        [(10, Progress::Partial(Reason::Unmovable))]
    );
    assert_eq!(
        scene.resize.progress(),
        Progress::Partial(Reason::Unmovable)
    );
    // It goes on after all.
    scene.request(RequestKind::Unplug, GIB..3 * GIB, Answer::Ack, GIB);
    assert_eq!(scene.actions(), [Action::Report(Progress::Reached)]);
}

#[test]
fn nothing_moved_is_a_stall() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(GIB);
    assert_eq!(
        Scene::reports(&scene.pass(S * 60)),
        [(10, Progress::Stalled(Reason::Unmovable))]
    );
    assert_eq!(Scene::reports(&scene.pass(S * 3600)), []);
}

#[test]
fn a_guest_that_is_stopped_has_no_time_to_lose() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(GIB);
    assert_eq!(Scene::kicks(&scene.pass(S * 3)), [2]);
    scene.resize.guest_stopped(scene.now);
    assert_eq!(scene.resize.wake_at(), None);
    assert_eq!(scene.pass(S * 3600), []);
    scene.resize.guest_stopped(scene.now);
    scene.resize.guest_runs(scene.now);
    // It had been silent for 1 s since it was told, and for 3 s in all.
    let happened = scene.pass(S * 8);
    assert_eq!(Scene::kicks(&happened), [3]);
    assert_eq!(
        Scene::reports(&happened),
        [(7, Progress::Stalled(Reason::Unmovable))]
    );
    scene.resize.guest_runs(scene.now);
    assert_eq!(scene.resize.hope + S * 11, scene.now);
}

#[test]
fn what_is_wanted_of_a_stopped_guest_is_wanted_from_when_it_runs() {
    let mut scene = Scene::settled(4 * GIB);
    scene.resize.guest_stopped(scene.now);
    scene.pass(S * 3600);
    scene.target(GIB);
    scene.pass(S * 3600);
    scene.resize.guest_runs(scene.now);
    assert_eq!(
        Scene::reports(&scene.pass(S * 60)),
        [(10, Progress::Stalled(Reason::Unmovable))]
    );
}

#[test]
fn moving_on_after_a_stall_is_work_again_and_may_stall_again() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(GIB);
    scene.pass(S * 11);
    scene.request(RequestKind::Unplug, 3 * GIB..4 * GIB, Answer::Ack, 3 * GIB);
    assert_eq!(scene.resize.progress(), Progress::Working);
    assert_eq!(
        Scene::reports(&scene.pass(S * 60)),
        [(10, Progress::Partial(Reason::Unmovable))]
    );
}

#[test]
fn an_offline_guest_is_recognised_soon() {
    let mut scene = Scene::settled(0);
    scene.target(4 * GIB);
    for step in 0..8 {
        let range = step * 128 * MIB..(step + 1) * 128 * MIB;
        scene.request(RequestKind::Plug, range.clone(), Answer::Ack, range.end);
    }
    // Told again after 1 s and 3 s; still silent 2 s later.
    assert_eq!(
        Scene::reports(&scene.pass(S * 9)),
        [(5, Progress::Partial(Reason::NotOnlined))]
    );
}

#[test]
fn a_guest_that_was_beyond_the_offline_limit_is_not_offline() {
    let mut scene = Scene::settled(3 * GIB);
    scene.target(GIB);
    scene.request(RequestKind::Unplug, GIB..3 * GIB, Answer::Ack, GIB);
    scene.actions();
    scene.target(4 * GIB);
    assert_eq!(
        Scene::reports(&scene.pass(S * 60)),
        [(10, Progress::Stalled(Reason::DriverIdle))]
    );
}

#[test]
fn granularity() {
    let mut scene = Scene::settled(0);
    scene.target(256 * MIB + BLOCK);
    scene.request(RequestKind::Plug, 0..128 * MIB, Answer::Ack, 128 * MIB);
    scene.request(
        RequestKind::Plug,
        128 * MIB..256 * MIB,
        Answer::Ack,
        256 * MIB,
    );
    assert_eq!(
        Scene::reports(&scene.pass(S * 9)),
        [(5, Progress::Partial(Reason::Granularity))]
    );

    // 4 MiB at a time, both ways.
    let mut scene = Scene::settled(256 * MIB);
    scene.target(256 * MIB - 6 * MIB);
    scene.request(
        RequestKind::Unplug,
        252 * MIB..256 * MIB,
        Answer::Ack,
        252 * MIB,
    );
    assert_eq!(
        Scene::reports(&scene.pass(S * 9)),
        [(8, Progress::Partial(Reason::Granularity))]
    );
}

#[test]
fn a_rest_of_memory_blocks_is_unmovable_rather_than_granularity() {
    let mut scene = Scene::settled(GIB);
    scene.target(GIB - 64 * MIB);
    assert_eq!(
        Scene::reports(&scene.pass(S * 60)),
        [(10, Progress::Stalled(Reason::Unmovable))]
    );
}

#[test]
fn host_trouble() {
    let mut scene = Scene::settled(GIB);
    scene.target(4 * GIB);
    let busy = Some(Setback::HostMemory);
    scene.failing(RequestKind::Plug, GIB..2 * GIB, Answer::Busy, busy, GIB);
    assert_eq!(
        Scene::reports(&scene.pass(S * 60)),
        [(10, Progress::Stalled(Reason::HostMemory))]
    );
    // A new target forgets it.
    scene.target(5 * GIB);
    assert_eq!(
        Scene::reports(&scene.pass(S * 60)),
        [(5, Progress::Stalled(Reason::NotOnlined))]
    );
}

#[test]
fn no_driver() {
    let now = Instant::now();
    let resize = Resize::new(Pacing::default(), GIB, now);
    let mut scene = Scene {
        resize,
        now,
        plugged: 0,
    };
    let happened = scene.pass(S * 100);
    assert_eq!(
        happened,
        [(S * 60, Action::Report(Progress::Stalled(Reason::NoDriver)))]
    );
    scene.resize.driver_ready(scene.now);
    assert_eq!(scene.resize.progress(), Progress::Working);
    scene.request(RequestKind::Plug, 0..GIB, Answer::Ack, GIB);
    assert_eq!(scene.actions(), [Action::Report(Progress::Reached)]);
}

#[test]
fn nothing_requested_and_no_driver_is_fine() {
    let now = Instant::now();
    let mut scene = Scene {
        resize: Resize::new(Pacing::default(), 0, now),
        now,
        plugged: 0,
    };
    assert_eq!(scene.actions(), []);
    assert_eq!(scene.pass(S * 1000), []);
    scene.target_without_driver(GIB);
    assert_eq!(
        scene.pass(S * 100),
        [(S * 60, Action::Report(Progress::Stalled(Reason::NoDriver)))]
    );
}

impl Scene {
    fn target_without_driver(&mut self, bytes: u64) {
        self.resize.target_set(self.now, bytes);
        assert_eq!(self.actions(), []);
    }
}

#[test]
fn a_reboot_in_the_middle() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(2 * GIB);
    scene.resize.driver_gone(scene.now);
    assert_eq!(scene.pass(S * 14), []);
    scene.resize.emptied(scene.now, 0);
    scene.resize.driver_ready(scene.now);
    scene.request(RequestKind::Plug, 0..2 * GIB, Answer::Ack, 2 * GIB);
    assert_eq!(scene.actions(), [Action::Report(Progress::Reached)]);
}

#[test]
fn broken_drivers_are_reported_at_once_and_left_alone() {
    let mut scene = Scene::settled(GIB);
    scene.target(4 * GIB);
    scene.resize.driver_broken(scene.now);
    let broken = Action::Report(Progress::Stalled(Reason::DriverBroken));
    assert_eq!(scene.actions(), [broken]);
    assert_eq!(scene.pass(S * 3600), []);
    scene.resize.driver_gone(scene.now);
    scene.resize.driver_ready(scene.now);
    assert_eq!(scene.resize.progress(), Progress::Working);

    // An error is what breaks Linux for good; another driver may go on.
    scene.request(RequestKind::Plug, GIB..2 * GIB, Answer::Error, GIB);
    assert_eq!(scene.resize.driver(), DriverState::Broken);
    assert_eq!(scene.actions(), [broken]);
    scene.request(RequestKind::State, GIB..2 * GIB, Answer::Error, GIB);
    assert_eq!(scene.resize.driver(), DriverState::Ready);
}

#[test]
fn the_operator_can_retry() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(GIB);
    scene.pass(S * 3600);
    assert_eq!(scene.resize.wake_at(), None);
    scene.resize.retried(scene.now);
    assert_eq!(scene.resize.progress(), Progress::Working);
    assert_eq!(Scene::kicks(&scene.pass(S * 8)), [2, 6]);
}

#[test]
fn a_request_that_is_dropped_leaves_nothing_behind() {
    let mut scene = Scene::settled(4 * GIB);
    scene.target(GIB);
    scene.resize.request_begun(scene.now);
    scene.resize.driver_gone(scene.now);
    scene.resize.request_dropped(scene.now, 4 * GIB);
    scene.resize.driver_ready(scene.now);
    assert_eq!(Scene::kicks(&scene.pass(S * 3)), [2]);
}

#[test]
fn names_are_words() {
    for reason in [
        Reason::NoDriver,
        Reason::NotOnlined,
        Reason::IoInFlight,
        Reason::DriverIdle,
    ] {
        assert!(
            reason
                .name()
                .chars()
                .all(|c| c.is_ascii_lowercase() || c == '-')
        );
        assert!(reason.to_string().len() > reason.name().len());
    }
}

/// splitmix64
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// One thing that may happen, also what an honest driver would not do.
fn random_event(scene: &mut Scene, random: &mut Random) {
    let now = scene.now;
    let resize = &mut scene.resize;
    let amount = random.below(9) * 512 * MIB;
    match random.below(12) {
        0 | 1 => resize.target_set(now, amount),
        2 => resize.retried(now),
        3 => resize.driver_gone(now),
        4 | 5 => resize.driver_ready(now),
        6 => resize.driver_broken(now),
        7 => resize.emptied(now, 0),
        8 => resize.request_dropped(now, amount),
        _ => resize.request_begun(now),
    }
    if random.below(3) == 0 && resize.begun.is_some() {
        let answers = [Answer::Ack, Answer::Nack, Answer::Busy, Answer::Error];
        let answered = Answered {
            kind: [RequestKind::Plug, RequestKind::State][random.below(2) as usize],
            range: Some(0..amount),
            answer: answers[random.below(4) as usize],
            setback: None,
            plugged: amount,
        };
        resize.request_answered(now, &answered);
    }
}

#[test]
fn whatever_happens_a_driver_at_work_is_left_alone_and_an_idle_one_not_pestered() {
    for seed in 0..300 {
        let mut random = Random(seed);
        let mut scene = Scene::settled(GIB);
        for _ in 0..200 {
            random_event(&mut scene, &mut random);
            scene.actions();
            let idle = scene.resize.driver() == DriverState::Ready && scene.resize.begun.is_none();
            let behind = scene.resize.plugged != scene.resize.target;
            // Nothing but time passes: `pass` sees to it that nobody is woken for nothing.
            let happened = scene.pass(random.below(3600) as u32 * S / 4);
            let kicks = Scene::kicks(&happened);
            assert!(kicks.is_empty() || idle && behind, "{:?}", scene.resize);
            assert!(kicks.len() <= Pacing::default().kicks_max as usize);
            assert!(
                kicks.windows(2).all(|pair| pair[1] > pair[0]),
                "{kicks:?} in the same second"
            );
            assert!(Scene::reports(&happened).len() <= 1, "{happened:?}");
        }
    }
}
