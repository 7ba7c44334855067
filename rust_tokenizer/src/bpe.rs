//! Exact training of byte-pair encoding.
//!
//! Ids 0 to 255 are the bytes; merge n creates id 256 + n. Each step merges the pair with the
//! highest count over all words (ties: the smallest (left, right)); within a word, pairs are
//! replaced from left to right.
//!
//! A merge changes few words, so counts are updated incrementally:
//! * All words lie in one arena with one slot per byte. A token stores its id in its first and last
//!   slot, so both its neighbours are one lookup away and nothing is ever moved.
//! * Every tracked pair has a list of the positions where it was created. A position goes stale when
//!   a neighbour merges; the slots show that, so lists need no deletions. A pair is created by a
//!   single merge, that of its newer token, so its list is built once, with its exact size and in
//!   ascending order.
//! * Words are sorted by descending count. Frequent words are few and close together; the long tail
//!   of rare words is a few runs of equal count. So an ascending list walks through `runs` once, and
//!   frequent words stay in the cache.
//! * During a merge, changes to the neighbouring pairs are summed in arrays indexed by the
//!   neighbour's id, so the map of pairs is accessed once per neighbour, not once per position.
//! * Most pairs are too rare to ever be merged, so pairs created below a threshold are not tracked.
//!   A pair's count only falls after its creation, so none is missed until the best tracked count is
//!   below the threshold; then the threshold is lowered and all pairs are counted again.
//! * The heap is lazy: an entry holds an old count; if it is out of date when it reaches the top, it
//!   is pushed back with the current count.
//!
//! Tried: an initial threshold high enough to need a recount before the last merge (a third slower),
//! and one low enough to track useless pairs (a tenth slower).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::Ordering;

use crate::count::{prefetch, Watch, WordCounts};

/// Left and right id.
pub type Pair = (u32, u32);

/// The merges in order, each with its count at the time of merging.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Merges {
    pub pairs: Vec<Pair>,
    pub counts: Vec<u64>,
}

/// The words exceed the arena's 32-bit positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyWords(u64);

impl fmt::Display for TooManyWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the different words have {} bytes, at most {} fit: use less text",
            self.0,
            u32::MAX
        )
    }
}

impl std::error::Error for TooManyWords {}

/// Trains `num_merges` merges, or fewer if there are no pairs left.
pub fn train(words: WordCounts, num_merges: usize, watch: &Watch) -> Result<Merges, TooManyWords> {
    train_from(words, num_merges, None, watch)
}

/// `train` with a given initial threshold, so that tests can force any number of recounts.
pub fn train_from(
    words: WordCounts,
    num_merges: usize,
    threshold: Option<u64>,
    watch: &Watch,
) -> Result<Merges, TooManyWords> {
    if num_merges == 0 {
        return Ok(Merges::default());
    }
    // The last merge is never written to the arena, and one id is reserved for NONE.
    if 256 + num_merges <= 1 << 16 {
        let arena = Arena::<u16>::lay_out(words, watch)?;
        Ok(Trainer::new(arena, num_merges, threshold, watch).run())
    } else {
        let arena = Arena::<u32>::lay_out(words, watch)?;
        Ok(Trainer::new(arena, num_merges, threshold, watch).run())
    }
}

/// The integer type of stored ids: half the width halves the cache misses.
trait Id: Copy + Eq {
    /// Between words, and inside tokens.
    const NONE: Self;
    fn new(id: u32) -> Self;
    fn get(self) -> u32;
}

impl Id for u16 {
    const NONE: u16 = u16::MAX;
    fn new(id: u32) -> u16 {
        id as u16
    }
    fn get(self) -> u32 {
        self.into()
    }
}

impl Id for u32 {
    const NONE: u32 = u32::MAX;
    fn new(id: u32) -> u32 {
        id
    }
    fn get(self) -> u32 {
        self
    }
}

/// All words by descending count, with `NONE` before, between and after them.
struct Arena<I> {
    slots: Vec<I>,
    runs: Vec<Run>,
}

/// Words with equal counts, from slot `start` to the next run.
#[derive(Clone, Copy)]
struct Run {
    start: u32,
    count: u64,
}

impl<I: Id> Arena<I> {
    /// Counting sort for the many words with small counts, an ordinary sort for the rest.
    fn lay_out(words: WordCounts, watch: &Watch) -> Result<Arena<I>, TooManyWords> {
        const SMALL: usize = 1 << 12;
        let mut sizes = vec![0u64; SMALL];
        let mut frequent: Vec<(u64, Vec<u8>)> = Vec::new();
        words.for_each(|word, count| {
            if word.len() < 2 {
                return; // has no pairs
            }
            match sizes.get_mut(count as usize) {
                Some(size) if count < SMALL as u64 => *size += word.len() as u64 + 1,
                _ => frequent.push((count, word.to_vec())),
            }
        });
        frequent.sort_unstable_by_key(|&(count, _)| Reverse(count));
        let head: u64 = frequent.iter().map(|(_, word)| word.len() as u64 + 1).sum();
        let total = 1 + head + sizes.iter().sum::<u64>();
        if total >= u32::MAX.into() {
            return Err(TooManyWords(total));
        }
        let mut slots = vec![I::NONE; total as usize];
        let mut runs: Vec<Run> = Vec::new();
        let mut at = 1;
        for (count, word) in frequent {
            if runs.last().is_none_or(|run| run.count != count) {
                runs.push(Run { start: at as u32, count });
            }
            write_word(&mut slots, at, &word);
            at += word.len() + 1;
        }
        let mut next = vec![0; SMALL];
        for count in (0..SMALL).rev().filter(|&count| sizes[count] > 0) {
            runs.push(Run { start: at as u32, count: count as u64 });
            next[count] = at;
            at += sizes[count] as usize;
        }
        words.for_each(|word, count| {
            if word.len() >= 2 && count < SMALL as u64 && !watch.stopped() {
                write_word(&mut slots, next[count as usize], word);
                next[count as usize] += word.len() + 1;
            }
        });
        runs.push(Run { start: u32::MAX, count: 0 });
        Ok(Arena { slots, runs })
    }

    /// Calls `visit` with (left, right, position, count) for every pair there is, from left to
    /// right.
    fn for_each_pair(
        &self,
        lengths: &[u32],
        watch: &Watch,
        mut visit: impl FnMut(u32, u32, u32, u64),
    ) {
        for run in self.runs.windows(2) {
            let end = (run[1].start as usize).min(self.slots.len());
            let mut at = run[0].start as usize;
            while at < end && !watch.stopped() {
                let mut left = self.slots[at];
                while left != I::NONE {
                    let next = at + lengths[left.get() as usize] as usize;
                    let right = self.slots[next];
                    if right != I::NONE {
                        visit(left.get(), right.get(), at as u32, run[0].count);
                    }
                    (at, left) = (next, right);
                }
                at += 1;
            }
        }
    }
}

fn write_word<I: Id>(slots: &mut [I], at: usize, word: &[u8]) {
    for (slot, &byte) in slots[at..].iter_mut().zip(word) {
        *slot = I::new(byte.into());
    }
}

/// A tracked pair: its current count, and the positions where it was created.
#[derive(Default)]
struct Tracked {
    count: u64,
    positions: Vec<u32>,
}

/// The effect of a merge on the pairs with one neighbouring id.
#[derive(Clone, Copy, Default)]
struct Beside {
    /// Sum of the word counts over its positions.
    count: u64,
    /// Number of its positions.
    positions: u32,
    /// Index of its new list plus one; 0 for none.
    list: u32,
}

struct Trainer<'w, I> {
    arena: Arena<I>,
    num_merges: usize,
    threshold: u64,
    watch: &'w Watch,
    merges: Merges,
    /// Length of each token in bytes, which is also its number of slots.
    lengths: Vec<u32>,
    pairs: HashMap<Pair, Tracked, BuildHasherDefault<PairHasher>>,
    heap: BinaryHeap<(u64, Reverse<Pair>)>,
    left: Vec<Beside>,
    right: Vec<Beside>,
    touched_left: Vec<u32>,
    touched_right: Vec<u32>,
}

impl<'w, I: Id> Trainer<'w, I> {
    fn new(arena: Arena<I>, num_merges: usize, threshold: Option<u64>, watch: &'w Watch) -> Self {
        let mut trainer = Trainer {
            arena,
            num_merges,
            threshold: 0,
            watch,
            merges: Merges::default(),
            lengths: vec![1; 256],
            pairs: HashMap::default(),
            heap: BinaryHeap::new(),
            left: vec![Beside::default(); 256 + num_merges],
            right: vec![Beside::default(); 256 + num_merges],
            touched_left: Vec::new(),
            touched_right: Vec::new(),
        };
        trainer.threshold = threshold.unwrap_or_else(|| trainer.guess_threshold()).max(1);
        trainer.track_pairs();
        trainer
    }

    /// Slightly below the expected count of the last merge, so that one pass over the arena usually
    /// suffices: on English text the count of merge n is about 3 / n^1.5 of the text's bytes.
    fn guess_threshold(&self) -> u64 {
        let bytes = self.arena.runs.windows(2).map(|run| {
            let end = (run[1].start as usize).min(self.arena.slots.len());
            (end as u64 - u64::from(run[0].start)).saturating_mul(run[0].count)
        });
        let bytes = bytes.fold(0, u64::saturating_add);
        (2.0 * bytes as f64 / (self.num_merges as f64).powf(1.5)) as u64
    }

    fn run(mut self) -> Merges {
        while self.merges.pairs.len() < self.num_merges && !self.watch.stopped() {
            match self.heap.peek() {
                Some(&(count, _)) if count >= self.threshold => self.step(),
                _ if self.threshold > 1 => {
                    self.threshold = (self.threshold / 4).max(1);
                    self.track_pairs();
                }
                _ => break,
            }
        }
        self.merges
    }

    /// Merges the pair at the top of the heap, or pushes it back with its current count.
    fn step(&mut self) {
        let Some((count, Reverse(pair))) = self.heap.pop() else {
            return;
        };
        let Some(found) = self.pairs.get(&pair) else {
            return;
        };
        if found.count < count {
            self.heap.push((found.count, Reverse(pair)));
            return;
        }
        let Some(found) = self.pairs.remove(&pair) else {
            return;
        };
        let id = self.lengths.len() as u32;
        self.lengths.push(self.lengths[pair.0 as usize] + self.lengths[pair.1 as usize]);
        self.merges.pairs.push(pair);
        self.merges.counts.push(count);
        if self.merges.pairs.len() < self.num_merges {
            self.merge(pair, id, found.positions);
        }
        self.watch.merges.store(self.merges.pairs.len(), Ordering::Relaxed);
    }

    /// Replaces the pair by `id` at all `positions` that still hold it, and updates the counts.
    fn merge(&mut self, pair: Pair, id: u32, mut positions: Vec<u32>) {
        let both = self.replace(pair, id, &mut positions);
        let (a, b) = pair;
        let mut lists: Vec<(Pair, Tracked)> = Vec::new();
        let mut open = |born: Pair, count: u64, positions: u32| {
            let positions = Vec::with_capacity(positions as usize);
            lists.push((born, Tracked { count, positions }));
            lists.len() as u32
        };
        for &x in &self.touched_left {
            let beside = &mut self.left[x as usize];
            lose(&mut self.pairs, (x, a), beside.count, self.threshold);
            if beside.count >= self.threshold {
                beside.list = open((x, id), beside.count, beside.positions);
            }
        }
        for &y in &self.touched_right {
            let beside = &mut self.right[y as usize];
            lose(&mut self.pairs, (b, y), beside.count, self.threshold);
            if y == a {
                // Where the next pair was merged too, (id, a) became (id, id).
                beside.count -= both.count;
                beside.positions -= both.positions;
            }
            if beside.count >= self.threshold {
                beside.list = open((id, y), beside.count, beside.positions);
            }
        }
        let twice = if both.count >= self.threshold {
            open((id, id), both.count, both.positions)
        } else {
            0
        };
        self.fill(id, &positions, &mut lists, twice);
        for x in self.touched_left.drain(..) {
            self.left[x as usize] = Beside::default();
        }
        for y in self.touched_right.drain(..) {
            self.right[y as usize] = Beside::default();
        }
        for (born, tracked) in lists {
            self.heap.push((tracked.count, Reverse(born)));
            self.pairs.insert(born, tracked);
        }
    }

    /// Rewrites the slots, reduces `positions` to those that held the pair, and sums up the
    /// neighbours on both sides. Returns the occurrences that became (id, id).
    fn replace(&mut self, (a, b): Pair, id: u32, positions: &mut Vec<u32>) -> Beside {
        let slots = &mut self.arena.slots;
        let (a_slot, b_slot, id_slot) = (I::new(a), I::new(b), I::new(id));
        let a_length = self.lengths[a as usize] as usize;
        let length = self.lengths[id as usize] as usize;
        let mut both = Beside::default();
        let mut runs = RunWalk { runs: &self.arena.runs, at: 0 };
        let mut kept = 0;
        for index in 0..positions.len() {
            if let Some(&ahead) = positions.get(index + 16) {
                prefetch(slots, ahead as usize);
            }
            let position = positions[index];
            let at = position as usize;
            if slots[at] != a_slot || slots[at + a_length] != b_slot {
                continue;
            }
            positions[kept] = position;
            kept += 1;
            let count = runs.count(position);
            slots[at + a_length - 1] = I::NONE;
            slots[at + a_length] = I::NONE;
            slots[at] = id_slot;
            slots[at + length - 1] = id_slot;
            let x = slots[at - 1];
            if x == id_slot {
                both.count += count;
                both.positions += 1;
            } else if x != I::NONE {
                note(&mut self.left, &mut self.touched_left, x.get(), count);
            }
            let y = slots[at + length];
            if y != I::NONE {
                note(&mut self.right, &mut self.touched_right, y.get(), count);
            }
        }
        positions.truncate(kept);
        both
    }

    /// Fills the new position lists, now that their sizes are known.
    fn fill(&self, id: u32, positions: &[u32], lists: &mut [(Pair, Tracked)], twice: u32) {
        if lists.is_empty() {
            return;
        }
        let slots = &self.arena.slots;
        let length = self.lengths[id as usize];
        let mut add = |list: u32, position: u32| {
            if list > 0 {
                lists[list as usize - 1].1.positions.push(position);
            }
        };
        for (index, &position) in positions.iter().enumerate() {
            if let Some(&ahead) = positions.get(index + 16) {
                prefetch(slots, ahead as usize);
            }
            let x = slots[position as usize - 1];
            if x == I::new(id) {
                add(twice, position - length);
            } else if x != I::NONE {
                add(self.left[x.get() as usize].list, position - self.lengths[x.get() as usize]);
            }
            let y = slots[(position + length) as usize];
            if y != I::NONE && y != I::new(id) {
                add(self.right[y.get() as usize].list, position);
            }
        }
    }

    /// Counts all pairs from scratch and tracks those that reach the threshold.
    fn track_pairs(&mut self) {
        self.pairs = HashMap::default();
        self.heap.clear();
        let mut births = PairTable::default();
        self.arena.for_each_pair(&self.lengths, self.watch, |left, right, _, count| {
            let birth = births.entry(left, right);
            birth.count += count;
            birth.positions += 1;
        });
        let mut lists = Vec::new();
        for (pair, birth) in births.iter_mut().filter(|(_, birth)| birth.count >= self.threshold) {
            let positions = Vec::with_capacity(birth.positions as usize);
            lists.push((pair, Tracked { count: birth.count, positions }));
            birth.list = lists.len() as u32;
        }
        self.arena.for_each_pair(&self.lengths, self.watch, |left, right, position, _| {
            let list = births.entry(left, right).list;
            if list > 0 {
                lists[list as usize - 1].1.positions.push(position);
            }
        });
        let heads = lists.iter().map(|(pair, tracked)| (tracked.count, Reverse(*pair)));
        self.heap = heads.collect();
        self.pairs.extend(lists);
    }
}

fn note(beside: &mut [Beside], touched: &mut Vec<u32>, id: u32, count: u64) {
    let beside = &mut beside[id as usize];
    if beside.positions == 0 {
        touched.push(id);
    }
    beside.count += count;
    beside.positions += 1;
}

/// Subtracts `count` from a pair if it is tracked; drops it below the threshold.
fn lose(
    pairs: &mut HashMap<Pair, Tracked, BuildHasherDefault<PairHasher>>,
    pair: Pair,
    count: u64,
    threshold: u64,
) {
    if let Some(tracked) = pairs.get_mut(&pair) {
        tracked.count -= count;
        if tracked.count < threshold {
            pairs.remove(&pair);
        }
    }
}

/// Finds the word counts of positions that come in ascending order.
struct RunWalk<'r> {
    runs: &'r [Run],
    at: usize,
}

impl RunWalk<'_> {
    fn count(&mut self, position: u32) -> u64 {
        let mut step = 1;
        while self.runs[self.at + 1].start <= position {
            // Galloping search: double the stride until it overshoots, then bisect.
            let ahead = (self.at + step).min(self.runs.len() - 1);
            if self.runs[ahead].start <= position {
                self.at = ahead;
                step *= 2;
            } else {
                let between = &self.runs[self.at + 1..ahead];
                self.at += between.partition_point(|run| run.start <= position);
                break;
            }
        }
        self.runs[self.at].count
    }
}

/// Hash map from pair to `Beside` (open addressing), to count all pairs of the arena.
struct PairTable {
    slots: Vec<(Pair, Beside)>,
    used: usize,
}

const NO_PAIR: Pair = (u32::MAX, u32::MAX);

impl Default for PairTable {
    fn default() -> Self {
        PairTable { slots: vec![(NO_PAIR, Beside::default()); 1 << 14], used: 0 }
    }
}

impl PairTable {
    fn iter_mut(&mut self) -> impl Iterator<Item = (Pair, &mut Beside)> {
        let used = self.slots.iter_mut().filter(|(pair, _)| *pair != NO_PAIR);
        used.map(|(pair, beside)| (*pair, beside))
    }

    fn entry(&mut self, left: u32, right: u32) -> &mut Beside {
        if self.used * 2 > self.slots.len() {
            let doubled = vec![(NO_PAIR, Beside::default()); self.slots.len() * 2];
            for (pair, beside) in std::mem::replace(&mut self.slots, doubled) {
                if pair != NO_PAIR {
                    let at = self.find(pair);
                    self.slots[at] = (pair, beside);
                }
            }
        }
        let at = self.find((left, right));
        if self.slots[at].0 == NO_PAIR {
            self.slots[at].0 = (left, right);
            self.used += 1;
        }
        &mut self.slots[at].1
    }

    fn find(&self, pair: Pair) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = hash(pair) as usize & mask;
        while self.slots[at].0 != pair && self.slots[at].0 != NO_PAIR {
            at = (at + 1) & mask;
        }
        at
    }
}

fn hash((left, right): Pair) -> u64 {
    let mixed = (u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ mixed >> 32
}

/// A hash of two `u32` in one multiplication.
#[derive(Default)]
pub(crate) struct PairHasher(u64);

impl Hasher for PairHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(byte.into());
        }
    }

    fn write_u32(&mut self, half: u32) {
        self.0 = (self.0 << 32 | u64::from(half)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = self.0.rotate_left(26);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The reference: count every pair again for each merge.
    fn naive(words: &[(&[u8], u64)], num_merges: usize) -> Merges {
        let mut words: Vec<(Vec<u32>, u64)> = words
            .iter()
            .map(|(bytes, count)| (bytes.iter().map(|&b| b.into()).collect(), *count))
            .collect();
        let mut merges = Merges::default();
        for id in (256..).take(num_merges) {
            let mut counts: HashMap<Pair, u64> = HashMap::new();
            for (ids, count) in &words {
                for adjacent in ids.windows(2) {
                    *counts.entry((adjacent[0], adjacent[1])).or_default() += count;
                }
            }
            let best = counts.into_iter().max_by_key(|&(pair, count)| (count, Reverse(pair)));
            let Some((pair, count)) = best else { break };
            for (ids, _) in &mut words {
                merge_word(ids, pair, id);
            }
            merges.pairs.push(pair);
            merges.counts.push(count);
        }
        merges
    }

    fn merge_word(ids: &mut Vec<u32>, pair: Pair, id: u32) {
        let (mut read, mut write) = (0, 0);
        while read < ids.len() {
            let both = read + 1 < ids.len() && (ids[read], ids[read + 1]) == pair;
            ids[write] = if both { id } else { ids[read] };
            read += if both { 2 } else { 1 };
            write += 1;
        }
        ids.truncate(write);
    }

    fn counted(words: &[(&[u8], u64)]) -> WordCounts {
        let mut counts = WordCounts::default();
        for (word, count) in words {
            counts.add(word, *count);
        }
        counts
    }

    fn check(words: &[(&[u8], u64)], num_merges: usize) {
        let expected = naive(words, num_merges);
        for threshold in [None, Some(1), Some(2), Some(3), Some(64), Some(1000)] {
            let watch = Watch::default();
            let merges = train_from(counted(words), num_merges, threshold, &watch).unwrap();
            assert_eq!(merges, expected, "{words:?} from {threshold:?}");
            let arena = Arena::<u32>::lay_out(counted(words), &watch).unwrap();
            let wide = Trainer::new(arena, num_merges, threshold, &watch).run();
            assert_eq!(wide, expected, "{words:?} from {threshold:?}");
        }
    }

    #[test]
    fn equals_the_definition() {
        check(&[(b"aaa", 1)], 9);
        check(&[(b"aaaa", 3), (b"aaaaa", 2), (b"baab", 5), (b"", 7), (b"a", 1)], 9);
        check(&[(b"abcab", 1), (b"bcabc", 1 << 40), (b"cab", 1)], 9);
        check(&[(b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 1), (b"aaaaaaaaaaa", 5)], 30);
        check(&[], 3);
        check(&[(b"ab", 1)], 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

        #[test]
        fn equals_the_definition_on_any_words(
            words in prop::collection::vec(("[ab]{0,9}|[a-e]{0,20}|\\PC{0,8}", 1..50u64), 0..30),
            num_merges in 0..60usize,
        ) {
            let words: Vec<_> = words.iter().map(|(word, n)| (word.as_bytes(), *n)).collect();
            check(&words, num_merges);
        }
    }

    #[test]
    fn a_word_of_a_megabyte() {
        let word = b"ab".repeat(1 << 19);
        let watch = Watch::default();
        let merges = train(counted(&[(&word, 3)]), 20, &watch).unwrap();
        assert_eq!((merges.pairs[0], merges.counts[0]), ((97, 98), 3 << 19));
        for n in 1..20 {
            // 2^(20 - n) equal tokens in a row touch one time less.
            let (half, touches) = (255 + n as u32, (1 << (20 - n)) - 1);
            assert_eq!((merges.pairs[n], merges.counts[n]), ((half, half), 3 * touches));
        }
    }

    #[test]
    fn a_whole_vocabulary_in_16_bits_and_more() {
        let words: Vec<String> =
            (0..1 << 17).map(|n: u32| format!("{:x}", n.wrapping_mul(2_654_435_769))).collect();
        let words: Vec<_> = words.iter().map(|word| (word.as_bytes(), 1)).collect();
        let fits = (1 << 16) - 256;
        for num_merges in [fits, fits + 300] {
            let watch = Watch::default();
            let merges = train(counted(&words), num_merges, &watch).unwrap();
            assert_eq!(merges.pairs.len(), num_merges);
            let arena = Arena::<u32>::lay_out(counted(&words), &watch).unwrap();
            assert_eq!(merges, Trainer::new(arena, num_merges, None, &watch).run());
        }
    }

    #[test]
    fn a_stopped_training_ends_early() {
        let watch = Watch::default();
        watch.stop.store(true, Ordering::Relaxed);
        let merges = train(counted(&[(b"abab", 1)]), 5, &watch).unwrap();
        assert_eq!(merges, Merges::default());
    }
}
