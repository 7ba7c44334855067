//! Where the time of counting goes, in GB/s on one thread and two: `cargo bench` for made-up text,
//! `CORPUS=file cargo bench` for the documents of a file, separated by NUL bytes.

use std::hint::black_box;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use rust_tokenizer::bpe;
use rust_tokenizer::count::{Batch, Watch, WordCounts};
use rust_tokenizer::pretokenize::Splitter;

const PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const BATCH: usize = 1 << 18;
/// Reading alone is too quick for the clock of a thread.
const READS: usize = 20;

fn batches(corpus: &str) -> Vec<Mutex<Batch>> {
    let mut batches = Vec::new();
    let mut batch = Batch::default();
    for document in corpus.split('\0') {
        batch.push(document);
        batch.end_text();
        if batch.len() >= BATCH {
            batches.push(Mutex::new(std::mem::take(&mut batch)));
        }
    }
    batches.push(Mutex::new(batch));
    batches
}

/// Zipf-like words of a made-up language; a real corpus has more ways to surprise the caches.
fn made_up() -> String {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize
    };
    let words: Vec<String> = (0..200_000)
        .map(|_| (0..2 + random() % 9).map(|_| (b'a' + (random() % 26) as u8) as char).collect())
        .collect();
    let mut text = String::new();
    while text.len() < 50 << 20 {
        let rank = (1.0 - random() as f64 / (1u64 << 31) as f64).powi(4) * words.len() as f64;
        text.push_str(&words[(rank as usize).min(words.len() - 1)]);
        text.push_str([" ", " ", " ", " ", " ", ", ", ". ", "\n\n", "\0", "'s "][random() % 10]);
    }
    text
}

/// Seconds this thread has spent on a processor; where nobody counts them, seconds on the clock.
fn thread_seconds(start: Instant) -> f64 {
    let counted = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = counted.and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    nanoseconds.map_or_else(|| start.elapsed().as_secs_f64(), |ns| ns / 1e9)
}

/// Runs `work` and returns how long it took, not counting what other programs took.
fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let before = thread_seconds(start);
    let result = work();
    (result, thread_seconds(start) - before)
}

/// Best of five, in GB/s of work done `times` over; each thread's share is every `threads`-th
/// batch.
fn measure(
    name: &str,
    batches: &[Mutex<Batch>],
    threads: usize,
    times: usize,
    work: impl Fn(&mut dyn Iterator<Item = MutexGuard<Batch>>) + Sync,
) {
    let bytes: usize = batches.iter().map(|batch| batch.lock().unwrap().len()).sum();
    let run = || {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|first| {
                    let work = &work;
                    let again = move || {
                        for _ in 0..times {
                            let mine = batches.iter().skip(first).step_by(threads);
                            work(&mut mine.map(|batch| batch.lock().unwrap()));
                        }
                    };
                    scope.spawn(move || timed(again).1)
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).fold(0.0, f64::max)
        })
    };
    let best = (0..5).map(|_| run()).fold(f64::MAX, f64::min);
    let seconds = best / times as f64;
    println!("{name:<14}{threads} threads{:8.3} GB/s{seconds:8.3} s", bytes as f64 / seconds / 1e9);
}

fn main() {
    let corpus = match std::env::var("CORPUS") {
        Ok(path) => std::fs::read_to_string(path).expect("CORPUS is a readable UTF-8 file"),
        Err(_) => made_up(),
    };
    let batches = batches(&corpus);
    drop(corpus);
    let splitter = Splitter::new(PATTERN).expect("the pattern compiles");
    for threads in [1, 2] {
        measure("read", &batches, threads, READS, |batches| {
            for batch in batches {
                black_box(batch.checksum());
            }
        });
        measure("scan", &batches, threads, 1, |batches| {
            for mut batch in batches {
                let mut words = 0;
                let (text, ends) = batch.close();
                let split = splitter.split(text, ends, |start, end| {
                    words += end - start;
                    true
                });
                black_box((split.is_ok(), words));
            }
        });
        measure("scan + count", &batches, threads, 1, |batches| {
            let mut counts = WordCounts::default();
            for mut batch in batches {
                black_box(counts.add_batch(&splitter, &mut batch, &Watch::default()).is_ok());
            }
            black_box(counts.len());
        });
    }
    let mut counts = WordCounts::default();
    for batch in &batches {
        let counted = counts.add_batch(&splitter, &mut batch.lock().unwrap(), &Watch::default());
        counted.expect("the scanner does not fail");
    }
    println!("{} different words", counts.len());
    let (merges, seconds) = timed(|| bpe::train(counts, 32_503, &Watch::default()));
    let merges = merges.expect("few enough words");
    let last = merges.counts.last().unwrap_or(&0);
    println!("{} merges in {seconds:.3} s, the last {last} times", merges.pairs.len());
}
