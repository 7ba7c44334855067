use pyo3::prelude::*;
#[pymodule]
fn rust_tokenizer(_m: &Bound<'_, PyModule>) -> PyResult<()> { Ok(()) }
