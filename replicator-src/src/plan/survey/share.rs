//! Work for several threads at once.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Threads at most: more than there are processors, for a disk that is not in the
/// cache does several things at once.
const THREADS: usize = 8;

/// What `work` makes of each number below `count`, in order, up to the first for which it
/// made nothing. Then no further is begun.
pub(super) fn share<T: Send>(count: usize, work: impl Fn(usize) -> Option<T> + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let some = || {
        let mut made = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return made;
            }
            let Some(one) = work(at) else {
                next.store(count, Ordering::Relaxed);
                return made;
            };
            made.push((at, one));
        }
    };
    let mut made = thread::scope(|scope| {
        let named = || thread::Builder::new().name("survey".to_owned());
        // Where there is no thread, there is more to do for the others.
        let helpers = 1..THREADS.min(count);
        let helpers: Vec<_> =
            helpers.map_while(|_| named().spawn_scoped(scope, some).ok()).collect();
        let mut made = some();
        for helper in helpers {
            made.append(&mut helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        made
    });
    made.sort_unstable_by_key(|(at, _)| *at);
    // Another thread may have made something for one behind it.
    let through = made.iter().enumerate().take_while(|(n, (at, _))| n == at).count();
    made.truncate(through);
    made.into_iter().map(|(_, one)| one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_done_once_and_in_order() {
        for count in [0, 1, 2, 7, 8, 1000] {
            assert!(share(count, Some).into_iter().eq(0..count), "{count}");
        }
    }

    #[test]
    fn it_ends_before_the_first_that_is_not_done() {
        for stop in [0, 1, 5, 99] {
            let made = share(100, |at| (at < stop).then_some(at));
            assert!(made.into_iter().eq(0..stop), "{stop}");
        }
    }
}
