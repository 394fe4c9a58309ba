// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine for the search: a switch `sw` with the devices `a` and `b`; backends, guest and management are scripted.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use ebbtide_device::{
    Answer, Bus, Detached, Draining, Eject, Gone, GuestEject, GuestNotice, Holder, Identity, Model,
    NodeId, Pending, Phase, Subtree, Surroundings, Tree, remove,
};
use ebbtide_gate::{Entry, Gate, Lease};

/// What somebody does. Each entry of a list happens once, or not at all, at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    RequestChild,
    RequestSwitch,
    CancelChild,
    EjectChild,
    EjectSwitch,
    CompleteChild,
    CompleteSwitch,
    /// A device `c` is plugged into the switch.
    Plug,
    /// Management tries to use the id of `a` again.
    ReuseId,
    TimeOut,
    Force,
    /// What was requested is removed without the guest.
    Reset,
}

type Dropped = Arc<Mutex<Vec<String>>>;

struct Fake {
    id: &'static str,
    gate: Arc<Gate>,
    dropped: Dropped,
}

impl Model for Fake {
    fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    fn drain(&mut self) -> Draining {
        assert!(self.gate.is_closed(), "drained before it was isolated");
        Box::pin(self.gate.drained())
    }

    fn holders(&self) -> Vec<Holder> {
        vec![Holder {
            what: self.id.into(),
            age: None,
        }]
    }

    fn force(&mut self) -> bool {
        self.id == "a"
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let fine = self.gate.is_drained() || std::thread::panicking();
        assert!(fine, "{}: dropped in use", self.id);
        self.dropped.lock().unwrap().push(self.id.into());
    }
}

/// What the machine around a removal saw.
struct Around {
    tree: RefCell<Tree<&'static str>>,
    gates: RefCell<Vec<(&'static str, Arc<Gate>)>>,
    forgotten: RefCell<Vec<String>>,
    told: RefCell<Vec<String>>,
    deleted: RefCell<Vec<String>>,
    dropped: Dropped,
    /// Sub-trees the pool has not come to yet.
    pool: RefCell<VecDeque<Job>>,
    sleepers: RefCell<Vec<Rc<Sleeper>>>,
    stalls: Cell<u32>,
    start: Instant,
}

type Job = (
    Subtree<Detached>,
    Rc<RefCell<Option<Vec<Gone>>>>,
    Rc<Cell<Option<Waker>>>,
);

#[derive(Default)]
struct Sleeper {
    over: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

struct Sleep(Rc<Sleeper>);

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.0.over.get() {
            return Poll::Ready(());
        }
        *self.0.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

struct Forgetting(Rc<Around>);

impl Bus for Forgetting {
    fn forget(&mut self, identity: &Identity, device: &dyn Model) {
        assert!(device.gate().is_drained(), "forgotten in use");
        self.0
            .forgotten
            .borrow_mut()
            .push(identity.id.clone().unwrap());
    }
}

struct Env(Rc<Around>);

impl Surroundings<&'static str> for Env {
    type Bus = Forgetting;

    fn tree(&self) -> &RefCell<Tree<&'static str>> {
        &self.0.tree
    }
    fn now(&self) -> Instant {
        self.0.start
    }
    fn sleep(&self, _duration: Duration) -> Pending<()> {
        let sleeper = Rc::<Sleeper>::default();
        self.0.sleepers.borrow_mut().push(Rc::clone(&sleeper));
        Box::pin(Sleep(sleeper))
    }
    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }
    fn bus(&self) -> Forgetting {
        Forgetting(Rc::clone(&self.0))
    }
    fn stalled(&self, _top: &Identity, _age: Duration, undrained: &[(Identity, Vec<Holder>)]) {
        assert!(!undrained.is_empty(), "a stall without anybody to blame");
        self.0.stalls.set(self.0.stalls.get() + 1);
    }
    fn tell_guest(&self, top: NodeId, _notice: GuestNotice) {
        let id = self.0.tree.borrow().get(top).unwrap().info;
        self.0.told.borrow_mut().push(id.to_owned());
        if id == "sw" {
            // Whatever was below is forgotten, and nothing of it is in use.
            let forgotten = self.0.forgotten.borrow();
            for (id, gate) in &*self.0.gates.borrow() {
                assert!(gate.is_drained(), "the guest is told while {id} is in use");
                assert!(
                    forgotten.iter().any(|f| f == id),
                    "{id} is still on its bus"
                );
            }
        }
    }
    fn destroy(&self, subtree: Subtree<Detached>) -> Pending<Vec<Gone>> {
        let (result, waker) = (Rc::default(), Rc::<Cell<Option<Waker>>>::default());
        let job = (subtree, Rc::clone(&result), Rc::clone(&waker));
        self.0.pool.borrow_mut().push_back(job);
        Box::pin(std::future::poll_fn(move |cx| {
            match result.borrow_mut().take() {
                Some(gone) => Poll::Ready(gone),
                None => {
                    waker.set(Some(cx.waker().clone()));
                    Poll::Pending
                }
            }
        }))
    }
    fn deleted(&self, gone: Gone, info: &'static str) {
        let id = gone.identity().id.clone().unwrap();
        assert_eq!(id, info);
        assert!(
            self.0.dropped.lock().unwrap().contains(&id),
            "told of {id} before its drop"
        );
        let mut deleted = self.0.deleted.borrow_mut();
        assert!(!deleted.contains(&id), "told twice of {id}");
        assert!(
            id == "sw" || !deleted.contains(&"sw".into()),
            "{id} after its switch"
        );
        deleted.push(id);
    }
}

struct Task {
    future: Pin<Box<dyn Future<Output = bool>>>,
    ready: Arc<Ready>,
}

struct Ready(AtomicBool);

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub struct World {
    around: Rc<Around>,
    actions: Vec<Action>,
    tasks: Vec<Task>,
    requests: Vec<(&'static str, Lease)>,
    late: bool,
}

impl World {
    pub fn new(actions: &[Action]) -> World {
        let around = Rc::new(Around {
            tree: RefCell::default(),
            gates: RefCell::default(),
            forgotten: RefCell::default(),
            told: RefCell::default(),
            deleted: RefCell::default(),
            dropped: Dropped::default(),
            pool: RefCell::default(),
            sleepers: RefCell::default(),
            stalls: Cell::new(0),
            start: Instant::now(),
        });
        let mut world = World {
            around,
            actions: actions.to_vec(),
            tasks: Vec::new(),
            requests: Vec::new(),
            late: false,
        };
        assert!(world.plug("sw") && world.plug("a") && world.plug("b"));
        for id in ["sw", "a"] {
            let lease = world.gate(id).enter(Entry::Io).unwrap();
            world.requests.push((id, lease));
        }
        world
    }

    fn plug(&mut self, id: &'static str) -> bool {
        if id != "sw" && self.node("sw").is_none() {
            return false;
        }
        let gate = Gate::new(id);
        let fake = Fake {
            id,
            gate: Arc::clone(&gate),
            dropped: Arc::clone(&self.around.dropped),
        };
        let identity = Identity {
            id: Some(id.into()),
            path: format!("/machine/peripheral/{id}"),
        };
        let mut tree = self.around.tree.borrow_mut();
        let parent = tree.by_id("sw");
        let eject = Eject::new(GuestEject::Requested, &gate);
        let plugged = tree.plug(
            parent,
            identity,
            Box::new(fake),
            Some(eject),
            id,
            self.around.start,
        );
        drop(tree);
        match plugged {
            Ok(_) => {
                self.around.gates.borrow_mut().push((id, gate));
                true
            }
            Err((_, model)) => {
                // The unwinding of a failed plug.
                gate.close();
                drop(model);
                self.around.dropped.lock().unwrap().retain(|d| d != id);
                false
            }
        }
    }

    fn gate(&self, id: &str) -> Arc<Gate> {
        let gates = self.around.gates.borrow();
        Arc::clone(&gates.iter().find(|(of, _)| *of == id).unwrap().1)
    }

    fn node(&self, id: &str) -> Option<NodeId> {
        self.around.tree.borrow().by_id(id)
    }

    /// Actions that are left, tasks that are ready, jobs of the pool.
    pub fn options(&self) -> usize {
        self.actions.len() + self.ready().len() + usize::from(!self.around.pool.borrow().is_empty())
    }

    fn ready(&self) -> Vec<usize> {
        let ready = |task: &Task| task.ready.0.load(Ordering::SeqCst);
        (0..self.tasks.len())
            .filter(|at| ready(&self.tasks[*at]))
            .collect()
    }

    pub fn act(&mut self, choice: usize) {
        if choice < self.actions.len() {
            let action = self.actions.remove(choice);
            return self.perform(action);
        }
        let (choice, ready) = (choice - self.actions.len(), self.ready());
        match ready.get(choice) {
            Some(task) => self.poll(*task),
            None => self.run_pool(),
        }
    }

    fn poll(&mut self, at: usize) {
        let task = &mut self.tasks[at];
        task.ready.0.store(false, Ordering::SeqCst);
        let waker = Waker::from(Arc::clone(&task.ready));
        if task
            .future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready()
        {
            drop(self.tasks.remove(at));
        }
    }

    fn run_pool(&mut self) {
        let (subtree, result, waker) = self.around.pool.borrow_mut().pop_front().unwrap();
        *result.borrow_mut() = Some(subtree.destroy_here());
        waker.take().inspect(Waker::wake_by_ref);
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::RequestChild => self.request("a"),
            Action::RequestSwitch => self.request("sw"),
            Action::CancelChild => self.cancel("a"),
            Action::EjectChild => self.eject("a"),
            Action::EjectSwitch => self.eject("sw"),
            Action::CompleteChild => self.requests.retain(|(id, _)| *id != "a"),
            Action::CompleteSwitch => self.requests.retain(|(id, _)| *id != "sw"),
            Action::Plug => {
                let leaving = self.gate("sw").is_closed();
                assert_eq!(self.plug("c"), !leaving);
            }
            Action::ReuseId => {
                let free = self.around.tree.borrow().check_id("a").is_ok();
                let gone = self.around.deleted.borrow().contains(&"a".into());
                assert_eq!(
                    free, gone,
                    "the id of a device is free when management was told"
                );
            }
            Action::TimeOut => {
                self.late = true;
                for sleeper in self.around.sleepers.borrow_mut().drain(..) {
                    sleeper.over.set(true);
                    sleeper.waker.take().inspect(Waker::wake_by_ref);
                }
            }
            Action::Force => {
                if let Some(node) = self.node("sw") {
                    let _ = self.around.tree.borrow_mut().force(node);
                }
            }
            Action::Reset => {
                let requested: Vec<NodeId> = {
                    let tree = self.around.tree.borrow();
                    let pending = tree
                        .iter()
                        .filter(|(_, n)| n.eject().is_some_and(|e| e.is_requested()));
                    pending.map(|(id, _)| id).collect()
                };
                requested.into_iter().for_each(|node| self.remove(node));
            }
        }
    }

    fn request(&mut self, id: &str) {
        if let Some(node) = self.node(id) {
            let isolated = self.gate(id).is_closed();
            let asked = self
                .around
                .tree
                .borrow_mut()
                .request(node, self.around.start);
            assert_eq!(asked.is_err(), isolated, "{asked:?}");
        }
    }

    fn cancel(&mut self, id: &str) {
        if let Some(node) = self.node(id) {
            let cancelled = self
                .around
                .tree
                .borrow_mut()
                .cancel(node, self.around.start);
            assert!(
                !cancelled || !self.gate(id).is_closed(),
                "withdrawn and isolated"
            );
        }
    }

    /// The guest's write, and the message it posts.
    fn eject(&mut self, id: &str) {
        let Some(node) = self.node(id) else { return };
        let eject = self
            .around
            .tree
            .borrow()
            .get(node)
            .and_then(|n| n.eject().cloned());
        let (eject, requested) = eject.map(|e| (e.clone(), e.is_requested())).unwrap();
        match eject.eject() {
            Answer::Isolated => {
                assert!(requested);
                self.remove(node);
            }
            Answer::Already | Answer::Refused => assert!(!requested),
        }
    }

    fn remove(&mut self, node: NodeId) {
        let env = Env(Rc::clone(&self.around));
        self.tasks.push(Task {
            future: Box::pin(async move { remove(&env, node).await }),
            ready: Arc::new(Ready(AtomicBool::new(true))),
        });
    }

    /// What holds at every moment.
    pub fn check(&self) {
        let tree = self.around.tree.borrow();
        let deleted = self.around.deleted.borrow();
        for (id, gate) in &*self.around.gates.borrow() {
            let node = tree.by_id(id).and_then(|node| tree.get(node));
            assert_eq!(node.is_none(), deleted.contains(&(*id).to_owned()), "{id}");
            let Some(node) = node else { continue };
            let eject = node.eject().unwrap();
            assert!(
                !eject.is_isolated() || gate.is_closed(),
                "{id}: isolated and open"
            );
            if node.phase() >= Phase::Draining {
                assert!(gate.is_closed() || node.model().is_none());
            }
        }
        if self.gate("sw").is_closed() {
            for (id, gate) in &*self.around.gates.borrow() {
                assert!(gate.is_closed(), "{id} below the ejected switch is open");
            }
        }
    }

    /// The backends answer, everything runs to its end: nothing that was isolated is left.
    pub fn finish(&mut self) {
        self.requests.clear();
        loop {
            match self.ready().first() {
                Some(task) => self.poll(*task),
                None if !self.around.pool.borrow().is_empty() => self.run_pool(),
                None => break,
            }
            self.check();
        }
        assert!(self.tasks.is_empty(), "a removal hangs");
        let deleted = self.around.deleted.borrow();
        for (id, gate) in &*self.around.gates.borrow() {
            let gone = deleted.contains(&(*id).to_owned());
            assert_eq!(gone, gate.is_closed(), "{id}");
        }
        assert_eq!(deleted.len(), self.around.dropped.lock().unwrap().len());
        assert!(self.late || self.around.stalls.get() == 0);
        // Whatever stays plugged is put away like at the end of a machine.
        let gates = self.around.gates.borrow();
        gates.iter().for_each(|(_, gate)| {
            gate.close();
        });
    }
}
