//! A fast, exact byte-level BPE trainer and encoder. `pretokenize` splits text into words, `count`
//! counts them, `bpe` trains merges and `encode` applies them. This file is only the Python binding:
//! it converts values, releases the GIL and maps errors.

pub mod bpe;
pub mod count;
pub mod encode;
pub mod pretokenize;
mod window;

#[cfg(feature = "python")]
#[pyo3::pymodule]
mod rust_tokenizer {
    use std::sync::atomic::Ordering;
    use std::sync::mpsc::{channel, RecvTimeoutError};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
    use pyo3::intern;
    use pyo3::prelude::*;
    use pyo3::types::{PyByteArray, PySlice, PyString};

    use crate::bpe::{self, Merges};
    use crate::count::{Batch, CountError, Pool, Watch};
    use crate::encode::{self, Encoded};
    use crate::pretokenize::Splitter;

    /// Upper bounds, with a margin, on holding the GIL and on the response to Ctrl-C.
    const TURN: Duration = Duration::from_millis(20);
    const PROGRESS: Duration = Duration::from_millis(50);
    /// Characters converted at a time, which takes a few milliseconds.
    const PART: usize = 1 << 20;
    /// Bytes of text per unit of work of an encoding thread.
    const ENCODED_AT_ONCE: usize = 1 << 16;

    fn value_error(error: impl ToString) -> PyErr {
        PyValueError::new_err(error.to_string())
    }

    fn count_error(error: CountError) -> PyErr {
        match error {
            CountError::Pattern(error) => value_error(error),
            CountError::Panicked => PyRuntimeError::new_err(error.to_string()),
        }
    }

    /// The main thread's periodic work: signals and the progress callback.
    struct Ticker {
        progress: Option<Py<PyAny>>,
        last: Instant,
    }

    impl Ticker {
        fn silent() -> Ticker {
            Ticker { progress: None, last: Instant::now() }
        }

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

    /// Passes all documents to the pool.
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

    /// Copies a document in parts, so that a huge one does not hold the GIL for long.
    ///
    /// ASCII is read in place. For other text Python would cache the UTF-8 for the lifetime of the
    /// document; a bytes object is freed at once.
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

    /// Merges the counts and trains in another thread, so that this one stays responsive.
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

    /// See rust_tokenizer.pyi.
    #[pyclass(frozen)]
    struct Encoder(encode::Encoder);

    #[pymethods]
    impl Encoder {
        #[new]
        fn new(merges: Vec<bpe::Pair>, pattern: &str) -> PyResult<Encoder> {
            encode::Encoder::new(pattern, &merges).map(Encoder).map_err(value_error)
        }

        #[pyo3(signature = (texts, *, threads=1, prefix=None, wide=false))]
        fn encode_batch<'py>(
            &self,
            py: Python<'py>,
            texts: &Bound<'py, PyAny>,
            threads: usize,
            prefix: Option<u32>,
            wide: bool,
        ) -> PyResult<(Bound<'py, PyByteArray>, Bound<'py, PyByteArray>)> {
            if threads == 0 {
                return Err(value_error("threads must be at least 1, got 0"));
            }
            let (watch, mut ticker) = (Watch::default(), Ticker::silent());
            let mut batches = vec![Batch::default()];
            for text in texts.try_iter()? {
                if batches[batches.len() - 1].len() >= ENCODED_AT_ONCE {
                    batches.push(Batch::default());
                }
                let last = batches.len() - 1;
                append(&text?, &mut batches[last], &mut ticker, &watch)?;
            }
            let batches: Vec<Mutex<Batch>> = batches.into_iter().map(Mutex::new).collect();
            let encoded = py.detach(|| self.0.encode(&batches, prefix, threads));
            let encoded = encoded.map_err(count_error)?;
            Ok((ids_of(py, &encoded, wide)?, offsets_of(py, &encoded)?))
        }
    }

    fn ids_of<'py>(
        py: Python<'py>,
        encoded: &[Encoded],
        wide: bool,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let ids = encoded.iter().flat_map(|part| &part.ids);
        let length = encoded.iter().map(|part| part.ids.len()).sum::<usize>();
        PyByteArray::new_with(py, length * if wide { 4 } else { 2 }, |bytes| {
            if wide {
                let slots = bytes.chunks_exact_mut(4);
                slots.zip(ids).for_each(|(slot, id)| slot.copy_from_slice(&id.to_ne_bytes()));
                return Ok(());
            }
            for (slot, &id) in bytes.chunks_exact_mut(2).zip(ids) {
                let id = u16::try_from(id).map_err(|_| {
                    value_error(format!("id {id} does not fit into 16 bits: set wide=True"))
                })?;
                slot.copy_from_slice(&id.to_ne_bytes());
            }
            Ok(())
        })
    }

    fn offsets_of<'py>(py: Python<'py>, encoded: &[Encoded]) -> PyResult<Bound<'py, PyByteArray>> {
        let mut offsets = vec![0];
        let mut before = 0;
        for part in encoded {
            offsets.extend(part.ends.iter().map(|end| before + *end as u64));
            before += part.ids.len() as u64;
        }
        PyByteArray::new_with(py, offsets.len() * 8, |bytes| {
            let slots = bytes.chunks_exact_mut(8).zip(&offsets);
            slots.for_each(|(slot, offset)| slot.copy_from_slice(&offset.to_ne_bytes()));
            Ok(())
        })
    }
}
