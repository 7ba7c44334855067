//! Encodes many texts into one flat array of ids.
//!
//! Nearly all words of a text are found in a small cache, so encoding runs at the speed of the
//! scanner. Other words are merged pair by pair, lowest id first, leftmost on ties. For trained
//! merges this gives the same result as `tiktoken`, which looks up bytes instead of pairs, because
//! training never creates the same bytes twice (see the tokenizer's tests).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::BuildHasherDefault;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::bpe::{Pair, PairHasher};
use crate::count::{hash, pack, Batch, CountError};
use crate::pretokenize::{PatternError, Splitter};

const CACHED: usize = 1 << 15;
const CACHED_IDS: usize = 7;
/// From this many bytes on, a heap finds the next pair instead of a linear scan.
const LONG: usize = 100;
const NONE: u32 = u32::MAX;

/// The merges of a tokenizer, ready for encoding.
pub struct Encoder {
    splitter: Splitter,
    merged: HashMap<Pair, u32, BuildHasherDefault<PairHasher>>,
    /// Caches of finished threads, to be reused by later ones.
    caches: Mutex<Vec<Vec<Cached>>>,
}

/// The concatenated ids of texts, and the end of each text's ids.
#[derive(Debug, Default)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub ends: Vec<usize>,
}

/// A word of at most 15 bytes with its ids.
#[derive(Clone, Copy, Default)]
struct Cached {
    key: u128,
    ids: [u32; CACHED_IDS],
    length: u32,
}

impl Encoder {
    /// `merges`: merge n, a pair of ids, creates id 256 + n.
    pub fn new(pattern: &str, merges: &[Pair]) -> Result<Encoder, PatternError> {
        Ok(Encoder {
            splitter: Splitter::new(pattern)?,
            merged: merges.iter().copied().zip(256..).collect(),
            caches: Mutex::default(),
        })
    }

    /// Encodes batches in parallel; every text starts with `prefix`, if given.
    pub fn encode(
        &self,
        batches: &[Mutex<Batch>],
        prefix: Option<u32>,
        threads: usize,
    ) -> Result<Vec<Encoded>, CountError> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut cache = self.lend_cache();
            let mut done = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(batch) = batches.get(number) else { break };
                let mut batch = batch.lock().unwrap_or_else(PoisonError::into_inner);
                done.push((number, self.encode_batch(&mut batch, prefix, &mut cache)?));
            }
            self.caches.lock().unwrap_or_else(PoisonError::into_inner).push(cache);
            Ok(done)
        };
        let mut encoded = std::thread::scope(|scope| {
            let workers: Vec<_> =
                (0..threads.min(batches.len())).map(|_| scope.spawn(work)).collect();
            let mut encoded = Vec::new();
            for worker in workers {
                let done: Result<Vec<_>, PatternError> =
                    worker.join().map_err(|_| CountError::Panicked)?;
                encoded.extend(done.map_err(CountError::Pattern)?);
            }
            Ok(encoded)
        })?;
        encoded.sort_unstable_by_key(|&(number, _)| number);
        Ok(encoded.into_iter().map(|(_, ids)| ids).collect())
    }

    fn lend_cache(&self) -> Vec<Cached> {
        let lent = self.caches.lock().unwrap_or_else(PoisonError::into_inner).pop();
        lent.unwrap_or_else(|| vec![Cached::default(); CACHED])
    }

    fn encode_batch(
        &self,
        batch: &mut Batch,
        prefix: Option<u32>,
        cache: &mut [Cached],
    ) -> Result<Encoded, PatternError> {
        let mut ids = Vec::with_capacity(batch.len() / 3);
        let mut ends = Vec::new();
        let (text, text_ends) = batch.close();
        let bytes = text.as_bytes();
        let mut start = 0;
        for &end in text_ends {
            ids.extend(prefix);
            self.splitter.split_text(text, start, end, &mut |start, end| {
                self.encode_word(&bytes[start..], end - start, cache, &mut ids);
                true
            })?;
            ends.push(ids.len());
            start = end;
        }
        Ok(Encoded { ids, ends })
    }

    /// Appends the ids of the word `bytes[..length]`.
    #[inline]
    fn encode_word(&self, bytes: &[u8], length: usize, cache: &mut [Cached], ids: &mut Vec<u32>) {
        let Some(key) = pack(bytes, length) else {
            return self.merge(&bytes[..length], ids);
        };
        let cached = &mut cache[hash(key) as usize % CACHED];
        if cached.key == key {
            ids.extend_from_slice(&cached.ids[..cached.length as usize]);
            return;
        }
        let start = ids.len();
        self.merge(&bytes[..length], ids);
        let found = &ids[start..];
        if found.len() <= CACHED_IDS {
            *cached = Cached { key, length: found.len() as u32, ..Cached::default() };
            cached.ids[..found.len()].copy_from_slice(found);
        }
    }

    fn merge(&self, word: &[u8], ids: &mut Vec<u32>) {
        if word.len() < LONG {
            self.merge_short(word, ids);
        } else {
            self.merge_long(word, ids);
        }
    }

    fn merged(&self, left: u32, right: u32) -> u32 {
        self.merged.get(&(left, right)).copied().unwrap_or(NONE)
    }

    fn merge_short(&self, word: &[u8], ids: &mut Vec<u32>) {
        let start = ids.len();
        ids.extend(word.iter().map(|&byte| u32::from(byte)));
        let mut pairs = [NONE; LONG]; // what the id there and the next one make
        for (pair, two) in pairs.iter_mut().zip(ids[start..].windows(2)) {
            *pair = self.merged(two[0], two[1]);
        }
        let mut length = word.len();
        while length > 1 {
            let (at, id) = (0..length - 1)
                .map(|at| (at, pairs[at]))
                .fold((0, NONE), |best, here| if here.1 < best.1 { here } else { best });
            if id == NONE {
                break;
            }
            let ids = &mut ids[start..start + length];
            ids[at] = id;
            ids.copy_within(at + 2.., at + 1);
            pairs.copy_within(at + 1..length, at);
            length -= 1;
            pairs[at] = if at + 1 < length { self.merged(id, ids[at + 1]) } else { NONE };
            if at > 0 {
                pairs[at - 1] = self.merged(ids[at - 1], id);
            }
        }
        ids.truncate(start + length);
    }

    /// The same in O(n log n), with a heap.
    fn merge_long(&self, word: &[u8], ids: &mut Vec<u32>) {
        let mut tokens: Vec<u32> = word.iter().map(|&byte| byte.into()).collect();
        let mut next: Vec<usize> = (1..=tokens.len()).collect();
        let mut before: Vec<usize> = (0..tokens.len()).map(|at| at.wrapping_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        for (at, two) in tokens.windows(2).enumerate() {
            heap.push(Reverse((self.merged(two[0], two[1]), at)));
        }
        while let Some(Reverse((id, at))) = heap.pop() {
            if id == NONE {
                break;
            }
            // Entries go stale when a neighbour merges; NONE marks tokens that no longer exist.
            let right = next[at];
            if tokens[at] == NONE
                || right >= tokens.len()
                || self.merged(tokens[at], tokens[right]) != id
            {
                continue;
            }
            tokens[at] = id;
            tokens[right] = NONE;
            next[at] = next[right];
            if let Some(after) = before.get_mut(next[at]) {
                *after = at;
                heap.push(Reverse((self.merged(id, tokens[next[at]]), at)));
            }
            if let Some(&left) = tokens.get(before[at]) {
                heap.push(Reverse((self.merged(left, id), before[at])));
            }
        }
        ids.extend(tokens.into_iter().filter(|&id| id != NONE));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bpe::train;
    use crate::count::{Watch, WordCounts};

    fn replay(word: &[u8], merges: &[Pair]) -> Vec<u32> {
        let mut ids: Vec<u32> = word.iter().map(|&byte| byte.into()).collect();
        for (&pair, id) in merges.iter().zip(256..) {
            let mut at = 0;
            while at + 1 < ids.len() {
                if (ids[at], ids[at + 1]) == pair {
                    ids.splice(at..at + 2, [id]);
                }
                at += 1;
            }
        }
        ids
    }

    fn trained(words: &[&str], num_merges: usize) -> Vec<Pair> {
        let mut counts = WordCounts::default();
        for word in words {
            counts.add(word.as_bytes(), 1);
        }
        train(counts, num_merges, &Watch::default()).unwrap().pairs
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

        #[test]
        fn equals_a_replay_of_the_merges(
            words in prop::collection::vec("[ab]{1,30}|[a-d]{1,150}", 1..20),
            num_merges in 0..80usize,
        ) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let merges = trained(&words, num_merges);
            let encoder = Encoder::new(r"\S+", &merges).unwrap();
            for word in words.iter().chain(&["aaaaaaa", "abcdabcd"]) {
                let (mut short, mut long) = (Vec::new(), Vec::new());
                if word.len() < LONG {
                    encoder.merge_short(word.as_bytes(), &mut short);
                    prop_assert_eq!(&short, &replay(word.as_bytes(), &merges));
                }
                encoder.merge_long(word.as_bytes(), &mut long);
                prop_assert_eq!(&long, &replay(word.as_bytes(), &merges));
            }
        }
    }

    #[test]
    fn texts_keep_their_order_and_their_ends() {
        let merges = trained(&["hello", "hello", "world"], 6);
        let encoder = Encoder::new(r"\S+|\s+", &merges).unwrap();
        let texts: Vec<String> = (0..2000).map(|n| format!("hello {n} samestart{n}")).collect();
        let batches: Vec<Mutex<Batch>> = texts
            .chunks(7)
            .map(|texts| {
                let mut batch = Batch::default();
                for text in texts {
                    batch.push(text);
                    batch.end_text();
                }
                Mutex::new(batch)
            })
            .collect();
        for threads in [1, 3] {
            let encoded = encoder.encode(&batches, Some(999), threads).unwrap();
            let mut found = Vec::new();
            for Encoded { ids, ends } in encoded {
                let starts = std::iter::once(0).chain(ends.iter().copied());
                found.extend(starts.zip(&ends).map(|(start, &end)| ids[start..end].to_vec()));
            }
            for (text, ids) in texts.iter().zip(&found) {
                let words =
                    text.split_inclusive(' ').flat_map(|part| match part.strip_suffix(' ') {
                        Some(word) => vec![word, " "],
                        None => vec![part],
                    });
                let mut expected = vec![999];
                words.for_each(|word| expected.extend(replay(word.as_bytes(), &merges)));
                assert_eq!(*ids, expected);
            }
            assert_eq!(found.len(), texts.len());
        }
    }
}
