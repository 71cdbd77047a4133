// SPDX-License-Identifier: GPL-2.0

//! What the loop remembers about one guest.
//!
//! `ordered_kb` is what its balloon was last told, or what it was when it was first seen. While
//! `reached` is false the guest is on its way there, somewhere between `low_kb` and `high_kb`.

use super::{
    Safety, Seen, FOREIGN_KB, HOLD_S, INACTIVE_S, NEWS_S, PEACE_S, RETRY_S, STRESS_REFAULTS,
    STRESS_SWAP_KB, TOLERANCE_KB, UNCOOPERATIVE_S, WATCH_S,
};
use crate::snapshot::{HostSample, VmSample};
use serde::Serialize;
use std::collections::VecDeque;

/// Decisions that are remembered for each guest.
const REMEMBERED: usize = 32;

/// How a guest behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Conduct {
    /// It has what it was ordered to have.
    Settled,
    /// It is on its way.
    Moving,
    /// It makes no progress; the others share without it.
    Inactive,
    /// It made none for long; it is tried again, more and more seldom.
    Uncooperative,
    /// Somebody else moved its balloon, and it is left to him.
    Held,
    /// Too little is known about it.
    NotReady,
}

impl Conduct {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Settled => "settled",
            Self::Moving => "moving",
            Self::Inactive => "inactive",
            Self::Uncooperative => "uncooperative",
            Self::Held => "held",
            Self::NotReady => "not ready",
        }
    }
}

/// One decision about a guest, with what it came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decision {
    /// When.
    pub at_s: f64,
    /// What the guest had.
    pub current_kb: u64,
    /// What the policy wanted it to have; `None` where it said nothing.
    pub wanted_kb: Option<u64>,
    /// What was to be ordered, bent by the loop's rules.
    pub aim_kb: u64,
    /// Why.
    pub reason: String,
    /// The guest as it was seen.
    pub sample: VmSample,
    /// The host as it was seen.
    pub host: HostSample,
}

/// What was moved, in magnitude and not only in number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Memory that arrived in the guest.
    pub added_kb: u64,
    /// Memory that left it.
    pub removed_kb: u64,
    /// Orders that were given.
    pub orders: u64,
    /// Grants that had to wait for memory to arrive at the host.
    pub waits: u64,
    /// How long they waited in all.
    pub waited_s: f64,
}

/// What was taken from a guest, and how it did then.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Taken {
    at_s: f64,
    before_kb: u64,
    swap_in_kb: Option<u64>,
    refaults: Option<u64>,
}

/// One guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Guest {
    current_kb: u64,
    ordered_kb: u64,
    /// All that its way can lead through: where it was, what it was told before, what it is told.
    low_kb: u64,
    high_kb: u64,
    reached: bool,
    ordered_s: f64,
    /// What it may have taken before it was called back, as long as its news may be older than that.
    called_back_kb: u64,
    /// Least distance to what was ordered, and when it was last made less.
    nearest_kb: u64,
    progress_s: f64,
    conduct: Conduct,
    retry_s: f64,
    pause_s: f64,
    held_until_s: f64,
    /// Swap-in and refaults at the last look.
    swap_in_kb: Option<u64>,
    refaults: Option<u64>,
    taken: Option<Taken>,
    keep_kb: u64,
    keep_until_s: f64,
    peace_s: f64,
    /// What it is to be given as soon as there is memory.
    grant_to_kb: Option<u64>,
    waiting: bool,
    decisions: VecDeque<Decision>,
    tally: Tally,
}

impl Guest {
    /// A guest that is seen for the first time: what it has is what it shall have. It may still be on
    /// its way from anywhere to anywhere.
    pub(super) fn new(now_s: f64, current_kb: u64) -> Self {
        Self {
            current_kb,
            ordered_kb: current_kb,
            low_kb: 0,
            high_kb: u64::MAX,
            reached: true,
            ordered_s: now_s,
            called_back_kb: 0,
            nearest_kb: 0,
            progress_s: 0.0,
            conduct: Conduct::Settled,
            retry_s: 0.0,
            pause_s: RETRY_S.0,
            held_until_s: 0.0,
            swap_in_kb: None,
            refaults: None,
            taken: None,
            keep_kb: 0,
            keep_until_s: 0.0,
            peace_s: PEACE_S.0,
            grant_to_kb: None,
            waiting: false,
            decisions: VecDeque::new(),
            tally: Tally::default(),
        }
    }

    /// How it behaves.
    pub fn conduct(&self) -> Conduct {
        self.conduct
    }

    /// What its balloon leaves it.
    pub fn current_kb(&self) -> u64 {
        self.current_kb
    }

    /// What its balloon was last told to leave it.
    pub fn ordered_kb(&self) -> u64 {
        self.ordered_kb
    }

    /// The last decisions, oldest first.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.decisions.iter()
    }

    /// Notes what the last decision came from.
    pub(super) fn note_inputs(&mut self, sample: &VmSample, host: HostSample) {
        if let Some(last) = self.decisions.back_mut() {
            last.sample.clone_from(sample);
            last.host = host;
        }
    }

    /// What was moved.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Whether the policies size it.
    pub(super) fn takes_part(&self) -> bool {
        matches!(
            self.conduct,
            Conduct::Settled | Conduct::Moving | Conduct::NotReady
        )
    }

    pub(super) fn is_held(&self) -> bool {
        self.conduct == Conduct::Held
    }

    /// Where it is on its way to; `None` where it stands.
    pub(super) fn on_its_way_to(&self) -> Option<u64> {
        (!self.reached).then_some(self.ordered_kb)
    }

    /// Most that it may take at any time without asking.
    pub(super) fn promised_kb(&self) -> u64 {
        self.current_kb
            .max(self.ordered_kb)
            .max(self.called_back_kb)
    }

    /// What must not be taken from it now.
    pub(super) fn keeps(&self, now_s: f64) -> Option<u64> {
        (now_s < self.keep_until_s).then_some(self.keep_kb)
    }

    /// Why it is sized as it is.
    pub(super) fn reason(&self) -> &str {
        self.decisions
            .back()
            .map_or("", |decision| decision.reason.as_str())
    }

    pub(super) fn release(&mut self) {
        if self.conduct == Conduct::Held {
            self.conduct = Conduct::Settled;
        }
    }

    /// Takes in what it did since the last look; an answer is an order that follows from that alone,
    /// and why.
    pub(super) fn observe(
        &mut self,
        now_s: f64,
        seen: &Seen,
        current_kb: u64,
        safety: &Safety,
    ) -> Option<(u64, &'static str)> {
        let before = std::mem::replace(&mut self.current_kb, current_kb);
        self.swap_in_kb = seen.swap_in_kb;
        self.refaults = seen.refaults;
        if !self.is_news_old(now_s) {
            self.called_back_kb = 0;
        }
        self.tally.added_kb += current_kb.saturating_sub(before);
        self.tally.removed_kb += before.saturating_sub(current_kb);

        if self.was_moved_by_others(now_s) {
            self.settle_at(current_kb);
            self.conduct = if safety.respect {
                Conduct::Held
            } else {
                Conduct::Settled
            };
            self.held_until_s = now_s + HOLD_S;
            return None;
        }
        if self.conduct == Conduct::Held && now_s >= self.held_until_s {
            self.conduct = Conduct::Settled;
        }
        if safety.stress {
            self.watch_for_stress(now_s);
        }
        self.watch_progress(now_s, safety)
    }

    /// Whether it is where neither its orders nor its way there can have brought it.
    fn was_moved_by_others(&self, now_s: f64) -> bool {
        let (current, ordered) = (self.current_kb, self.ordered_kb);
        let outside = current.saturating_add(FOREIGN_KB) < self.low_kb
            || current > self.high_kb.saturating_add(FOREIGN_KB);
        let went_back = current.abs_diff(ordered) > self.nearest_kb.saturating_add(FOREIGN_KB);
        outside || went_back && !self.is_news_old(now_s)
    }

    /// Whether what is seen may be from before the last order.
    fn is_news_old(&self, now_s: f64) -> bool {
        now_s - self.ordered_s < NEWS_S
    }

    fn watch_progress(&mut self, now_s: f64, safety: &Safety) -> Option<(u64, &'static str)> {
        let distance = self.current_kb.abs_diff(self.ordered_kb);
        if self.reached && distance > TOLERANCE_KB && self.is_news_old(now_s) {
            // It was called there by old news.
            self.reached = false;
            self.nearest_kb = distance;
            self.conduct = Conduct::Moving;
        }
        if self.reached {
            if matches!(self.conduct, Conduct::Inactive | Conduct::Uncooperative) {
                return self.wait_out(now_s, safety);
            }
            return None;
        }
        if distance <= TOLERANCE_KB {
            self.reached = true;
            self.nearest_kb = 0;
            self.conduct = Conduct::Settled;
            self.pause_s = RETRY_S.0;
            return None;
        }
        if distance + TOLERANCE_KB <= self.nearest_kb {
            self.nearest_kb = distance;
            self.progress_s = now_s;
            self.conduct = Conduct::Moving;
            return None;
        }
        let still_s = now_s - self.progress_s;
        if self.conduct == Conduct::Moving && still_s >= INACTIVE_S {
            self.conduct = Conduct::Inactive;
            // What it was given and did not take must not be promised for ever.
            if self.ordered_kb > self.current_kb && safety.stall {
                self.called_back_kb = self.ordered_kb;
                self.ordered_kb = self.current_kb;
                self.ordered_s = now_s;
                self.nearest_kb = 0;
                self.reached = true;
                self.tally.orders += 1;
                return Some((
                    self.current_kb,
                    "it does not grow: others get what it does not take",
                ));
            }
        }
        self.wait_out(now_s, safety)
    }

    /// Passes from inactive to uncooperative, and from there to the next try.
    fn wait_out(&mut self, now_s: f64, safety: &Safety) -> Option<(u64, &'static str)> {
        if self.conduct == Conduct::Inactive && now_s - self.progress_s >= UNCOOPERATIVE_S {
            self.conduct = Conduct::Uncooperative;
            self.retry_s = now_s + self.pause_s;
            if safety.back_off {
                self.pause_s = (self.pause_s * 2.0).min(RETRY_S.1);
            }
        } else if self.conduct == Conduct::Uncooperative && now_s >= self.retry_s {
            self.conduct = if self.reached {
                Conduct::Settled
            } else {
                Conduct::Moving
            };
            self.progress_s = now_s;
            self.ordered_s = now_s;
            self.tally.orders += 1;
            return Some((self.ordered_kb, "it did not move, and is told again"));
        }
        None
    }

    fn watch_for_stress(&mut self, now_s: f64) {
        let Some(taken) = self.taken else { return };
        let more = |now: Option<u64>, then: Option<u64>| {
            now.unwrap_or(0).saturating_sub(then.or(now).unwrap_or(0))
        };
        if more(self.swap_in_kb, taken.swap_in_kb) >= STRESS_SWAP_KB
            || more(self.refaults, taken.refaults) >= STRESS_REFAULTS
        {
            self.taken = None;
            self.keep_kb = taken.before_kb;
            self.keep_until_s = now_s + self.peace_s;
            self.peace_s = (self.peace_s * 2.0).min(PEACE_S.1);
            self.grant_to_kb = Some(taken.before_kb);
        } else if now_s - taken.at_s >= WATCH_S {
            self.taken = None;
            self.peace_s = PEACE_S.0;
        }
    }

    /// What it has is what it shall have.
    fn settle_at(&mut self, kb: u64) {
        self.ordered_kb = kb;
        (self.low_kb, self.high_kb) = (kb, kb);
        self.nearest_kb = 0;
        self.reached = true;
        self.grant_to_kb = None;
    }

    pub(super) fn forget_plan(&mut self) {
        self.grant_to_kb = None;
    }

    pub(super) fn not_ready(&mut self, now_s: f64, reason: String) {
        if self.conduct != Conduct::Moving {
            self.conduct = Conduct::NotReady;
        }
        self.remember(now_s, None, self.current_kb, &reason);
    }

    /// Notes what it should have; an answer is an order for what is to be taken at once.
    pub(super) fn plan(
        &mut self,
        now_s: f64,
        wanted_kb: u64,
        aim_kb: u64,
        why: &str,
    ) -> Option<u64> {
        if self.conduct == Conduct::NotReady {
            self.conduct = Conduct::Settled;
        }
        self.remember(now_s, Some(wanted_kb), aim_kb, why);
        let on_its_way_down = !self.reached && self.ordered_kb < self.current_kb;
        let on_its_way_up = !self.reached && self.ordered_kb > self.current_kb;
        if aim_kb < self.current_kb {
            // It is still on its way to less already: one step at a time.
            if on_its_way_down && aim_kb <= self.ordered_kb {
                return None;
            }
            self.taken = Some(Taken {
                at_s: now_s,
                before_kb: self.current_kb,
                swap_in_kb: self.swap_in_kb,
                refaults: self.refaults,
            });
            return self.order(now_s, aim_kb);
        }
        if on_its_way_down || on_its_way_up && aim_kb < self.ordered_kb {
            // It shall have more than it is on its way to, or less: stop it where that is.
            let stop = aim_kb.min(self.promised_kb());
            let order = self.order(now_s, stop);
            self.grant_to_kb = (aim_kb > stop).then_some(aim_kb);
            return order;
        }
        self.grant_to_kb = (aim_kb > self.promised_kb()).then_some(aim_kb);
        None
    }

    /// How much it is to be given beyond what it was promised.
    pub(super) fn waits_for(&self) -> Option<u64> {
        let more = self.grant_to_kb?.saturating_sub(self.promised_kb());
        (more > 0 && self.takes_part()).then_some(more)
    }

    /// Counts that it had to wait.
    pub(super) fn wait(&mut self, elapsed_s: f64) {
        if self.waiting {
            self.tally.waited_s += elapsed_s;
        } else {
            self.waiting = true;
            self.tally.waits += 1;
        }
    }

    /// Gives it so much of what it waits for.
    pub(super) fn grant(&mut self, now_s: f64, kb: u64) -> Option<u64> {
        self.waiting = false;
        let to = self.promised_kb().saturating_add(kb);
        if self.grant_to_kb.is_some_and(|all| to >= all) {
            self.grant_to_kb = None;
        }
        self.order(now_s, to)
    }

    /// Orders a size, unless it was ordered already.
    fn order(&mut self, now_s: f64, kb: u64) -> Option<u64> {
        if kb == self.ordered_kb {
            return None;
        }
        if self.reached && !self.is_news_old(now_s) {
            (self.low_kb, self.high_kb) = (self.current_kb, self.current_kb);
        }
        if !self.reached && self.ordered_kb > kb {
            self.called_back_kb = self.called_back_kb.max(self.ordered_kb);
        }
        self.low_kb = self.low_kb.min(kb).min(self.current_kb);
        self.high_kb = self.high_kb.max(kb).max(self.current_kb);
        self.ordered_kb = kb;
        self.ordered_s = now_s;
        self.nearest_kb = self.current_kb.abs_diff(kb);
        self.reached = false;
        self.progress_s = now_s;
        self.conduct = Conduct::Moving;
        self.tally.orders += 1;
        Some(kb)
    }

    fn remember(&mut self, at_s: f64, wanted_kb: Option<u64>, aim_kb: u64, reason: &str) {
        let current_kb = self.current_kb;
        // A decision that says the same again only moves its time on.
        if let Some(last) = self.decisions.back_mut() {
            if last.wanted_kb == wanted_kb && last.reason == reason && last.aim_kb == aim_kb {
                last.at_s = at_s;
                last.current_kb = current_kb;
                return;
            }
        }
        if self.decisions.len() == REMEMBERED {
            self.decisions.pop_front();
        }
        let reason = reason.to_owned();
        self.decisions.push_back(Decision {
            at_s,
            current_kb,
            wanted_kb,
            aim_kb,
            reason,
            sample: VmSample::default(),
            host: HostSample::default(),
        });
    }
}
