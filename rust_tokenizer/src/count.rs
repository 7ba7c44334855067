//! Word counts: the table that training starts from.
//!
//! Most of the training time is spent here, and most of that waiting for memory, so the design
//! minimises cache misses:
//! * Documents are copied into batches that fit the L2 cache. The copy costs a few percent, but it
//!   releases the Python object at once and adds padding after the last byte, so that any word can
//!   be read as one block.
//! * Nearly all words have at most 15 bytes. They are packed, with their length, into a `u128`:
//!   comparison is one instruction, without allocations. Longer words go to `LongWords`.
//! * Open addressing with linear probing in 32-byte slots: one cache line per word.
//! * Words are queued in groups of 64, and their slots prefetched before the first is counted. (32
//!   and 128 are slightly slower.)
//! * One table per thread, merged at the end: nothing is shared while counting.
//!
//! Tried and rejected: a small table of recent words in front of the large one, at any size (its
//! branch mispredictions cost more than the misses it saves); huge pages (no difference); finding
//! word ends byte by byte or eight letters at a time (see `window`); link-time optimisation (only
//! compiles longer).

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{spawn, JoinHandle};
use std::time::Duration;

use crate::pretokenize::{PatternError, Splitter, PADDING};

const PACKED: usize = 15;
const QUEUE: usize = 64;

/// Progress of the counting and training threads, and a flag to stop them.
#[derive(Debug, Default)]
pub struct Watch {
    /// Set to stop within milliseconds and keep what is done.
    pub stop: AtomicBool,
    /// Bytes of text counted.
    pub bytes: AtomicUsize,
    /// Merges done.
    pub merges: AtomicUsize,
}

impl Watch {
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Concatenated texts.
#[derive(Debug, Default)]
pub struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    /// Appends a part of a text; `end_text` finishes the text.
    pub fn push(&mut self, part: &str) {
        self.text.push_str(part);
    }

    pub fn end_text(&mut self) {
        self.ends.push(self.text.len());
    }

    /// Bytes of the finished texts.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// All texts with padding, and the end of each text.
    pub fn close(&mut self) -> (&str, &[usize]) {
        self.text.truncate(self.len());
        self.text.push_str(&"\0".repeat(PADDING));
        (&self.text, &self.ends)
    }

    /// Reads everything once, to measure the cost of reading.
    pub fn checksum(&self) -> u64 {
        let words = self.text.as_bytes().chunks_exact(8);
        words.fold(0, |sum: u64, eight| {
            sum.wrapping_add(u64::from_le_bytes(eight.try_into().unwrap_or_default()))
        })
    }

    fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }
}

/// Why counting failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CountError {
    Pattern(PatternError),
    /// A worker panicked: a bug.
    Panicked,
}

impl fmt::Display for CountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CountError::Pattern(error) => error.fmt(f),
            CountError::Panicked => write!(f, "a counting thread panicked"),
        }
    }
}

impl std::error::Error for CountError {}

/// Threads that count batches. A fixed number of batches circulates: `empty` hands one out, `count`
/// submits it, a worker empties it.
pub struct Pool {
    full: Sender<Batch>,
    empty: Receiver<Batch>,
    workers: Vec<JoinHandle<Result<WordCounts, PatternError>>>,
    watch: Arc<Watch>,
}

impl Pool {
    pub fn start(splitter: Splitter, threads: usize, watch: Arc<Watch>) -> Pool {
        let (full, to_count) = channel();
        let (counted, empty) = channel();
        for _ in 0..2 * threads {
            let _ = counted.send(Batch::default()); // `empty` is right here
        }
        let to_count = Arc::new(Mutex::new(to_count));
        let splitter = Arc::new(splitter);
        let workers = (0..threads)
            .map(|_| {
                let (splitter, watch) = (splitter.clone(), watch.clone());
                let (to_count, counted) = (to_count.clone(), counted.clone());
                spawn(move || work(&splitter, &to_count, &counted, &watch))
            })
            .collect();
        Pool { full, empty, workers, watch }
    }

    /// An empty batch, or None after waiting for `patience`. An error means that the workers have
    /// ended; `finish` says why.
    pub fn empty(&mut self, patience: Duration) -> Result<Option<Batch>, CountError> {
        match self.empty.recv_timeout(patience) {
            Ok(batch) => Ok(Some(batch)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(CountError::Panicked),
        }
    }

    pub fn count(&self, batch: Batch) {
        let _ = self.full.send(batch); // fails when all workers are gone; `finish` says why
    }

    /// Waits for the workers and merges their tables.
    pub fn finish(self) -> Result<WordCounts, CountError> {
        drop(self.full);
        let mut total = WordCounts::default();
        for worker in self.workers {
            let counts = worker.join().map_err(|_| CountError::Panicked)?;
            total.merge(counts.map_err(CountError::Pattern)?, &self.watch);
        }
        Ok(total)
    }
}

fn work(
    splitter: &Splitter,
    to_count: &Mutex<Receiver<Batch>>,
    counted: &Sender<Batch>,
    watch: &Watch,
) -> Result<WordCounts, PatternError> {
    let mut counts = WordCounts::default();
    loop {
        let next = to_count.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut batch) = next else {
            return Ok(counts);
        };
        counts.add_batch(splitter, &mut batch, watch)?;
        watch.bytes.fetch_add(batch.len(), Ordering::Relaxed);
        batch.clear();
        let _ = counted.send(batch); // fails when nobody wants batches any more
    }
}

/// The words of the texts counted so far.
pub struct WordCounts {
    slots: Vec<Slot>,
    used: usize,
    long: LongWords,
}

/// Key 0 marks an empty slot; no word has it, since the key includes the length.
#[derive(Clone, Copy, Default)]
struct Slot {
    key: u128,
    count: u64,
}

/// The word `bytes[..length]` in the low bytes of a key and its length in the highest, if it fits.
/// `bytes` must hold at least 16 bytes.
#[inline]
pub(crate) fn pack(bytes: &[u8], length: usize) -> Option<u128> {
    if length > PACKED {
        return None;
    }
    let mut word = [0; 16];
    word.copy_from_slice(&bytes[..16]);
    Some((u128::from_le_bytes(word) & KEEP[length]) | (length as u128) << 120)
}

fn unpack(key: &[u8; 16]) -> &[u8] {
    &key[..key[PACKED] as usize]
}

pub(crate) fn hash(key: u128) -> u64 {
    let low = key as u64 ^ 0x9E37_79B9_7F4A_7C15;
    let high = (key >> 64) as u64 ^ 0xD1B5_4A32_D192_ED03;
    let product = u128::from(low) * u128::from(high);
    product as u64 ^ (product >> 64) as u64
}

/// Masks that keep the first n of 16 bytes.
const KEEP: [u128; PACKED + 1] = {
    let mut masks = [0; PACKED + 1];
    let mut length = 1;
    while length <= PACKED {
        masks[length] = (1 << (8 * length)) - 1;
        length += 1;
    }
    masks
};

impl Default for WordCounts {
    fn default() -> Self {
        WordCounts { slots: vec![Slot::default(); 1 << 12], used: 0, long: LongWords::default() }
    }
}

impl WordCounts {
    /// Counts the words of a batch. Returns early when `watch` is stopped.
    pub fn add_batch(
        &mut self,
        splitter: &Splitter,
        batch: &mut Batch,
        watch: &Watch,
    ) -> Result<(), PatternError> {
        let mut queue = [0; QUEUE];
        let mut queued = 0;
        let (text, ends) = batch.close();
        splitter.split(text, ends, |start, end| {
            let Some(key) = pack(&text.as_bytes()[start..], end - start) else {
                self.long.add(&text.as_bytes()[start..end], 1);
                return !watch.stopped();
            };
            queue[queued] = key;
            self.prefetch(key);
            queued += 1;
            if queued < QUEUE {
                return true;
            }
            queued = 0;
            for &key in &queue {
                self.add_packed(key, 1);
            }
            !watch.stopped()
        })?;
        for &key in &queue[..queued] {
            self.add_packed(key, 1);
        }
        Ok(())
    }

    /// Adds one word: for tests, and for words counted elsewhere.
    pub fn add(&mut self, word: &[u8], count: u64) {
        if word.len() > PACKED {
            return self.long.add(word, count);
        }
        let mut padded = [0; 16];
        padded[..word.len()].copy_from_slice(word);
        if let Some(key) = pack(&padded, word.len()).filter(|&key| key != 0) {
            self.add_packed(key, count);
        }
    }

    /// Merges another table into this one.
    pub fn merge(&mut self, other: WordCounts, watch: &Watch) {
        let (mut small, large) = if self.used < other.used {
            (std::mem::replace(self, other), self)
        } else {
            (other, self)
        };
        for chunk in small.slots.chunks(QUEUE) {
            for slot in chunk {
                large.prefetch(slot.key);
            }
            for slot in chunk.iter().filter(|slot| slot.key != 0) {
                large.add_packed(slot.key, slot.count);
            }
            if watch.stopped() {
                return;
            }
        }
        small.slots = Vec::new();
        for (word, count) in small.long.iter() {
            large.long.add(word, count);
        }
    }

    /// Number of distinct words.
    pub fn len(&self) -> usize {
        self.used + self.long.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `visit` with every word and its count, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| slot.key != 0) {
            visit(unpack(&slot.key.to_le_bytes()), slot.count);
        }
        for (word, count) in self.long.iter() {
            visit(word, count);
        }
    }

    fn prefetch(&self, key: u128) {
        let slot = hash(key) as usize & (self.slots.len() - 1);
        prefetch(&self.slots, slot);
    }

    fn add_packed(&mut self, key: u128, count: u64) {
        let mask = self.slots.len() - 1;
        let mut at = hash(key) as usize & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.key == 0 {
                *slot = Slot { key, count };
                self.used += 1;
                if self.used > self.slots.len() / 8 * 5 {
                    self.grow();
                }
                return;
            }
            at = (at + 1) & mask;
        }
    }

    #[cold]
    fn grow(&mut self) {
        let doubled = vec![Slot::default(); self.slots.len() * 2];
        let mask = doubled.len() - 1;
        for old in std::mem::replace(&mut self.slots, doubled) {
            if old.key != 0 {
                let mut at = hash(old.key) as usize & mask;
                while self.slots[at].key != 0 {
                    at = (at + 1) & mask;
                }
                self.slots[at] = old;
            }
        }
    }
}

/// Prefetches a cache line; a no-op on other architectures.
pub(crate) fn prefetch<T>(items: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching never faults, whatever the address.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(items.as_ptr().wrapping_add(index).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (items, index);
}

/// Words of 16 bytes or more: their bytes in one arena, and a hash index of entry numbers.
#[derive(Default)]
struct LongWords {
    bytes: Vec<u8>,
    entries: Vec<LongWord>,
    index: Vec<u32>,
}

struct LongWord {
    hash: u64,
    start: usize,
    length: usize,
    count: u64,
}

impl LongWords {
    fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.entries.iter().map(|word| (self.bytes_of(word), word.count))
    }

    fn bytes_of(&self, word: &LongWord) -> &[u8] {
        &self.bytes[word.start..word.start + word.length]
    }

    fn add(&mut self, word: &[u8], count: u64) {
        if self.entries.len() >= self.index.len() / 2 {
            self.grow();
        }
        let hash = word.chunks(PACKED).fold(word.len() as u64, |seed, chunk| {
            let mut key = [0; 16];
            key[..chunk.len()].copy_from_slice(chunk);
            hash(u128::from_le_bytes(key) ^ u128::from(seed) << 61)
        });
        let mask = self.index.len() - 1;
        let mut at = hash as usize & mask;
        while self.index[at] != u32::MAX {
            let found = &self.entries[self.index[at] as usize];
            if found.hash == hash && self.bytes_of(found) == word {
                self.entries[self.index[at] as usize].count += count;
                return;
            }
            at = (at + 1) & mask;
        }
        self.index[at] = self.entries.len() as u32;
        let start = self.bytes.len();
        self.entries.push(LongWord { hash, start, length: word.len(), count });
        self.bytes.extend_from_slice(word);
    }

    #[cold]
    fn grow(&mut self) {
        let mask = (self.index.len() * 2).max(1 << 10) - 1;
        self.index = vec![u32::MAX; mask + 1];
        for (number, word) in self.entries.iter().enumerate() {
            let mut at = word.hash as usize & mask;
            while self.index[at] != u32::MAX {
                at = (at + 1) & mask;
            }
            self.index[at] = number as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn as_map(counts: &WordCounts) -> HashMap<Vec<u8>, u64> {
        let mut map = HashMap::new();
        counts.for_each(|word, count| assert!(map.insert(word.to_vec(), count).is_none()));
        assert_eq!(map.len(), counts.len());
        map
    }

    fn pooled(texts: &[String], threads: usize, texts_a_batch: usize) -> WordCounts {
        let splitter = Splitter::new(r"\S+").unwrap();
        let watch = Arc::new(Watch::default());
        let mut pool = Pool::start(splitter, threads, watch.clone());
        for texts in texts.chunks(texts_a_batch) {
            let mut batch = pool.empty(Duration::from_secs(60)).unwrap().unwrap();
            for text in texts {
                batch.push(text);
                batch.end_text();
            }
            pool.count(batch);
        }
        pool.finish().unwrap()
    }

    #[test]
    fn counts_do_not_depend_on_threads_and_batches() {
        let texts: Vec<String> = (0..3000u32)
            .map(|n| format!("w{} {} x\0y {}", n % 700, "long".repeat(n as usize % 9), n * n))
            .collect();
        let mut expected = HashMap::new();
        for word in texts.iter().flat_map(|text| text.split_whitespace()) {
            *expected.entry(word.as_bytes().to_vec()).or_default() += 1;
        }
        for (threads, texts_a_batch) in [(1, 3000), (1, 7), (2, 100), (5, 1)] {
            assert_eq!(as_map(&pooled(&texts, threads, texts_a_batch)), expected);
        }
    }

    #[test]
    fn words_of_every_length_and_counts_past_32_bits() {
        let mut counts = WordCounts::default();
        let mut expected = HashMap::new();
        for length in 1..=40 {
            let word = vec![length as u8; length];
            counts.add(&word, 1 << 40);
            counts.add(&word, 5);
            expected.insert(word, (1 << 40) + 5);
        }
        counts.add(b"", 1);
        assert_eq!(as_map(&counts), expected);
        let mut other = WordCounts::default();
        other.add(&[1], 2);
        other.merge(counts, &Watch::default());
        expected.insert(vec![1], (1 << 40) + 7);
        assert_eq!(as_map(&other), expected);
    }

    #[test]
    fn a_text_that_defeats_the_regex_is_an_error() {
        let splitter = Splitter::new(r"(?:(a+)+)\1b").unwrap();
        let mut batch = Batch::default();
        batch.push(&"a".repeat(3000));
        batch.end_text();
        let counted = WordCounts::default().add_batch(&splitter, &mut batch, &Watch::default());
        assert!(counted.unwrap_err().to_string().contains("pattern"));
    }
}
