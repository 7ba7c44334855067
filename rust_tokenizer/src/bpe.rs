//! Byte-pair encoding, trained exactly.
//!
//! Ids 0 to 255 are the bytes; merge number n makes id 256 + n. Each step merges the pair with the
//! highest count over all words, ties going to the smallest (left, right); inside a word, pairs
//! are replaced from left to right.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Left and right id.
pub type Pair = (u32, u32);

/// The merges in order, each with its count when it was merged.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Merges {
    pub pairs: Vec<Pair>,
    pub counts: Vec<u64>,
}

struct Word {
    ids: Vec<u32>,
    count: u64,
}

#[derive(Default)]
struct Occurrences {
    count: u64,
    words: Vec<u32>,
}

/// Trains `num_merges` merges, or as many as there are pairs. `go_on` is asked after every merge
/// with the number done; false ends the training early.
pub fn train<'w>(
    words: impl IntoIterator<Item = (&'w [u8], u64)>,
    num_merges: usize,
    mut go_on: impl FnMut(usize) -> bool,
) -> Merges {
    let mut words: Vec<Word> = words
        .into_iter()
        .map(|(bytes, count)| Word {
            ids: bytes.iter().map(|&b| b.into()).collect(),
            count,
        })
        .collect();
    let mut pairs: HashMap<Pair, Occurrences> = HashMap::new();
    for (index, word) in words.iter().enumerate() {
        add_pairs(&mut pairs, word, index);
    }
    let mut heap: BinaryHeap<(u64, Reverse<Pair>)> = pairs
        .iter()
        .map(|(&pair, found)| (found.count, Reverse(pair)))
        .collect();
    let mut merges = Merges::default();
    while merges.pairs.len() < num_merges {
        let Some((count, Reverse(pair))) = heap.pop() else {
            break;
        };
        let now = pairs.get(&pair).map_or(0, |found| found.count);
        if now != count {
            if now > 0 {
                heap.push((now, Reverse(pair)));
            }
            continue;
        }
        let id = 256 + merges.pairs.len() as u32;
        let found = pairs.remove(&pair).unwrap_or_default();
        let mut born = HashMap::new();
        for index in found.words {
            let word = &mut words[index as usize];
            for adjacent in word.ids.windows(2) {
                if let Some(found) = pairs.get_mut(&(adjacent[0], adjacent[1])) {
                    found.count -= word.count;
                }
            }
            merge_word(&mut word.ids, pair, id);
            for adjacent in word.ids.windows(2) {
                let key = (adjacent[0], adjacent[1]);
                if key.0 != id && key.1 != id {
                    if let Some(found) = pairs.get_mut(&key) {
                        found.count += word.count;
                    }
                }
            }
            let ids = word.ids.windows(2).filter(|a| a[0] == id || a[1] == id);
            for adjacent in ids {
                add(&mut born, (adjacent[0], adjacent[1]), word.count, index);
            }
        }
        heap.extend(
            born.iter()
                .map(|(&pair, found)| (found.count, Reverse(pair))),
        );
        pairs.extend(born);
        merges.pairs.push(pair);
        merges.counts.push(count);
        if !go_on(merges.pairs.len()) {
            break;
        }
    }
    merges
}

fn add_pairs(pairs: &mut HashMap<Pair, Occurrences>, word: &Word, index: usize) {
    for adjacent in word.ids.windows(2) {
        add(pairs, (adjacent[0], adjacent[1]), word.count, index as u32);
    }
}

fn add(pairs: &mut HashMap<Pair, Occurrences>, pair: Pair, count: u64, index: u32) {
    let found = pairs.entry(pair).or_default();
    found.count += count;
    if found.words.last() != Some(&index) {
        found.words.push(index);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: count every pair anew for each merge.
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
            let best = counts
                .into_iter()
                .max_by_key(|&(pair, count)| (count, Reverse(pair)));
            let Some((pair, count)) = best else { break };
            for (ids, _) in &mut words {
                merge_word(ids, pair, id);
            }
            merges.pairs.push(pair);
            merges.counts.push(count);
        }
        merges
    }

    fn check(words: &[(&[u8], u64)], num_merges: usize) {
        let merges = train(words.iter().copied(), num_merges, |_| true);
        assert_eq!(merges, naive(words, num_merges), "{words:?}");
    }

    #[test]
    fn equals_the_definition() {
        check(&[(b"aaa", 1)], 9);
        check(
            &[
                (b"aaaa", 3),
                (b"aaaaa", 2),
                (b"baab", 5),
                (b"", 7),
                (b"a", 1),
            ],
            9,
        );
        check(&[(b"abcab", 1), (b"bcabc", 1 << 40), (b"cab", 1)], 9);
        check(&[], 3);
    }
}
