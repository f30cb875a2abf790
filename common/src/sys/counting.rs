//! An allocator that counts what each thread has, for tests of bounds.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread has allocated and not freed, and the most there were.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

/// The system's allocator. To be a test program's `#[global_allocator]`.
pub struct Counting {
    /// Whether what is asked for zeroed counts, too. It takes no memory until
    /// something is written there: the codec makes a place that way for a byte
    /// string as long as it says it is.
    pub zeroed: bool,
}

fn more(bytes: usize) {
    let (held, most) = HELD.get();
    let held = held.wrapping_add_unsigned(bytes);
    HELD.set((held, most.max(held)));
}

fn less(bytes: usize) {
    let (held, most) = HELD.get();
    HELD.set((held.wrapping_sub_unsigned(bytes), most));
}

// SAFETY: all is passed on to the system's allocator as it is. Counting allocates
// nothing: the thread's cell is there from the beginning and is never dropped.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if self.zeroed {
            more(layout.size());
        }
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may be there for a moment.
        more(size);
        less(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        less(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(old, layout) }
    }
}

/// The most bytes that this thread had allocated at once during a call, beyond
/// those before. 0 where [`Counting`] is not the allocator.
pub fn peak(call: impl FnOnce()) -> usize {
    let before = HELD.get().0;
    HELD.set((before, before));
    call();
    usize::try_from(HELD.get().1 - before).unwrap_or(0)
}
