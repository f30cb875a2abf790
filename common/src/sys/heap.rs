//! How the programs' allocator (jemalloc) keeps what was freed.

/// What jemalloc reads when a program that has it begins; the environment's
/// `_RJEM_MALLOC_CONF` comes after this and may overrule it.
///
/// - `narenas:4`: threads share four arenas. By default each gets its own, up to
///   four a processor, and each keeps freed pages for itself.
/// - `dirty_decay_ms:1000`: freed pages go back to the kernel within about a
///   second, not ten: at 200,000 files, 60 MiB less at rest and 50 MiB less at
///   the peak, for batches free in a second as much as they take.
#[used]
// SAFETY: nothing else defines this symbol but jemalloc itself, weakly, as a
// pointer to bytes that end with 0; this is such a pointer.
#[unsafe(export_name = "_rjem_malloc_conf")]
static CONFIGURATION: &[u8; 47] = b"narenas:4,dirty_decay_ms:1000,muzzy_decay_ms:0\0";
