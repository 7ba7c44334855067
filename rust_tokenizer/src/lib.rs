//! A fast, exact byte-level BPE trainer: `pretokenize` splits text into words, `count` counts
//! them, `bpe` merges their bytes. This file is glue only: it converts, releases the GIL and maps
//! errors.

pub mod bpe;
pub mod count;
pub mod pretokenize;
mod window;

#[cfg(feature = "python")]
#[pyo3::pymodule]
mod rust_tokenizer {
    use std::sync::atomic::Ordering;
    use std::sync::mpsc::{channel, RecvTimeoutError};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
    use pyo3::intern;
    use pyo3::prelude::*;
    use pyo3::types::{PySlice, PyString};

    use crate::bpe::{self, Merges};
    use crate::count::{Batch, CountError, Pool, Watch};
    use crate::pretokenize::Splitter;

    /// The longest the GIL is held, and the longest that Ctrl-C waits for us, each with a margin.
    const TURN: Duration = Duration::from_millis(20);
    const PROGRESS: Duration = Duration::from_millis(50);
    /// Characters converted at a time: a few milliseconds.
    const PART: usize = 1 << 20;

    fn value_error(error: impl ToString) -> PyErr {
        PyValueError::new_err(error.to_string())
    }

    fn count_error(error: CountError) -> PyErr {
        match error {
            CountError::Pattern(error) => value_error(error),
            CountError::Panicked => PyRuntimeError::new_err(error.to_string()),
        }
    }

    /// What the main thread does between turns: signals, and the progress callback.
    struct Ticker {
        progress: Option<Py<PyAny>>,
        last: Instant,
    }

    impl Ticker {
        fn tick(
            &mut self,
            py: Python<'_>,
            phase: &str,
            done: usize,
            total: Option<usize>,
        ) -> PyResult<()> {
            py.check_signals()?;
            if let Some(progress) =
                self.progress.as_ref().filter(|_| self.last.elapsed() >= PROGRESS)
            {
                progress.call1(py, (phase, done, total))?;
                self.last = Instant::now();
            }
            Ok(())
        }
    }

    /// See rust_tokenizer.pyi.
    #[pyfunction]
    #[pyo3(signature = (documents, num_merges, pattern, progress=None, *, threads=None, batch_bytes=1 << 18))]
    fn train(
        py: Python<'_>,
        documents: &Bound<'_, PyAny>,
        num_merges: usize,
        pattern: &str,
        progress: Option<Py<PyAny>>,
        threads: Option<usize>,
        batch_bytes: usize,
    ) -> PyResult<(Vec<bpe::Pair>, Vec<u64>)> {
        if documents.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("documents is one str: give an iterable of them"));
        }
        if threads == Some(0) {
            return Err(value_error("threads must be at least 1, got 0"));
        }
        let splitter = Splitter::new(pattern).map_err(value_error)?;
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let watch = Arc::new(Watch::default());
        let mut pool = Pool::start(splitter, threads.unwrap_or(cores), watch.clone());
        let mut ticker = Ticker { progress, last: Instant::now() };
        let outcome = feed(documents, &mut pool, batch_bytes, &watch, &mut ticker)
            .and_then(|()| merge(py, pool, num_merges, &watch, &mut ticker));
        if outcome.is_err() {
            watch.stop.store(true, Ordering::Relaxed);
        }
        outcome.map(|merges| (merges.pairs, merges.counts))
    }

    /// Hands all documents to the pool.
    fn feed(
        documents: &Bound<'_, PyAny>,
        pool: &mut Pool,
        batch_bytes: usize,
        watch: &Watch,
        ticker: &mut Ticker,
    ) -> PyResult<()> {
        let py = documents.py();
        let mut turn = Instant::now();
        let mut batch = Batch::default();
        for document in documents.try_iter()? {
            append(&document?, &mut batch, ticker, watch)?;
            if batch.len() < batch_bytes && turn.elapsed() < TURN {
                continue;
            }
            pool.count(std::mem::take(&mut batch));
            batch = loop {
                ticker.tick(py, "count", watch.bytes.load(Ordering::Relaxed), None)?;
                match py.detach(|| pool.empty(TURN)) {
                    Ok(None) => {}
                    Ok(Some(batch)) => break batch,
                    Err(_) => return Ok(()), // the pool's end tells why
                }
            };
            turn = Instant::now();
        }
        pool.count(batch);
        Ok(())
    }

    /// Copies a document, a part at a time so that a huge one does not keep the GIL.
    ///
    /// ASCII is read in place. For other text Python would keep the UTF-8 it makes for us as long
    /// as the document lives; a bytes object goes at once.
    fn append(
        document: &Bound<'_, PyAny>,
        batch: &mut Batch,
        ticker: &mut Ticker,
        watch: &Watch,
    ) -> PyResult<()> {
        let py = document.py();
        let document = document.cast::<PyString>().map_err(|_| {
            let kind = document.get_type();
            PyTypeError::new_err(format!("documents must be str, got one of {kind}"))
        })?;
        let mut push = |part: &Bound<'_, PyString>| -> PyResult<()> {
            if part.call_method0(intern!(py, "isascii"))?.is_truthy()? {
                batch.push(part.to_str()?);
            } else {
                let utf8 = part.encode_utf8()?;
                batch.push(std::str::from_utf8(utf8.as_bytes()).map_err(value_error)?);
            }
            Ok(())
        };
        let length = document.len()?;
        if length <= PART {
            push(document)?;
        } else {
            for start in (0..length).step_by(PART) {
                let slice = PySlice::new(py, start as isize, (start + PART) as isize, 1);
                push(document.get_item(slice)?.cast::<PyString>()?)?;
                ticker.tick(py, "count", watch.bytes.load(Ordering::Relaxed), None)?;
                py.detach(std::thread::yield_now);
            }
        }
        batch.end_text();
        Ok(())
    }

    /// Adds up the counts and trains, in a thread of its own so that this one stays responsive.
    fn merge(
        py: Python<'_>,
        pool: Pool,
        num_merges: usize,
        watch: &Arc<Watch>,
        ticker: &mut Ticker,
    ) -> PyResult<Merges> {
        let (sender, mut receiver) = channel();
        let for_thread = watch.clone();
        std::thread::spawn(move || {
            let merges = pool.finish().map_err(count_error).and_then(|counts| {
                bpe::train(counts, num_merges, &for_thread).map_err(value_error)
            });
            let _ = sender.send(merges); // fails when nobody waits any more
        });
        loop {
            let waiting = &mut receiver;
            match py.detach(move || waiting.recv_timeout(TURN)) {
                Ok(merges) => return merges,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(count_error(CountError::Panicked))
                }
                Err(RecvTimeoutError::Timeout) => match watch.merges.load(Ordering::Relaxed) {
                    0 => ticker.tick(py, "count", watch.bytes.load(Ordering::Relaxed), None)?,
                    done => ticker.tick(py, "merge", done, Some(num_merges))?,
                },
            }
        }
    }
}
