//! A fast, exact byte-level BPE trainer: `pretokenize` splits text into words, `bpe` merges their
//! bytes. This file is glue only: it converts, releases the GIL and maps errors.

pub mod bpe;
pub mod pretokenize;

#[cfg(feature = "python")]
#[pyo3::pymodule]
mod rust_tokenizer {
    use std::collections::HashMap;

    use pyo3::exceptions::PyValueError;
    use pyo3::prelude::*;

    use crate::{bpe, pretokenize::Splitter};

    /// Train `num_merges` merges on the words of `documents`; see the stub for the contract.
    #[pyfunction]
    #[pyo3(signature = (documents, num_merges, pattern, progress=None))]
    fn train(
        py: Python<'_>,
        documents: &Bound<'_, PyAny>,
        num_merges: usize,
        pattern: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<(Vec<bpe::Pair>, Vec<u64>)> {
        let splitter = Splitter::new(pattern).map_err(|e| PyValueError::new_err(e.to_string()))?;
        let mut counts: HashMap<Vec<u8>, u64> = HashMap::new();
        for document in documents.try_iter()? {
            let document = document?;
            let text: &str = document.extract()?;
            py.detach(|| {
                splitter.split(text, |word| match counts.get_mut(word.as_bytes()) {
                    Some(count) => *count += 1,
                    None => drop(counts.insert(word.as_bytes().to_vec(), 1)),
                })
            })
            .map_err(|e| PyValueError::new_err(e.to_string()))?;
            py.check_signals()?;
        }
        let mut outcome = Ok(());
        let merges = py.detach(|| {
            let words = counts.iter().map(|(word, &count)| (word.as_slice(), count));
            bpe::train(words, num_merges, |done| {
                if done % 256 == 0 {
                    outcome = Python::attach(|py| {
                        py.check_signals()?;
                        if let Some(progress) = &progress {
                            progress.call1(py, ("merge", done, num_merges))?;
                        }
                        Ok(())
                    });
                }
                outcome.is_ok()
            })
        });
        outcome.map(|()| (merges.pairs, merges.counts))
    }
}
