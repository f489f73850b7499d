//! Expressions that Python built (python/vmitap/filters.py): from their description, a tuple of tuples in postfix order.

use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};

use crate::arch::amd64::Register;
use crate::capture::{Abi, Arith, Column, Node, Plan, Program, Source, Test, TextKind, TextTest};
use crate::error::VmiError;
use crate::session::WriteRule;
use crate::tap::OnWrite;

use super::convert::OnWriteArg;
use super::errors::invalid;

/// A compiled condition, and the functions its questions are put to.
#[derive(Default)]
pub struct Condition {
    pub program: Option<Arc<Program>>,
    pub predicates: Vec<Py<PyAny>>,
}

impl Condition {
    pub fn clone_ref(&self, py: Python<'_>) -> Self {
        let predicates = self.predicates.iter().map(|function| function.clone_ref(py)).collect();
        Self { program: self.program.clone(), predicates }
    }
}

/// The convention of that name.
pub fn abi(name: &str) -> PyResult<Abi> {
    match name {
        "sysv" => Ok(Abi::SystemV),
        "ms" => Ok(Abi::Microsoft),
        _ => Err(invalid("abi", format!("{name:?} is neither \"sysv\" nor \"ms\""))),
    }
}

/// A `Filter` argument.
pub fn condition(what: &'static str, filter: Option<&Bound<'_, PyAny>>, abi: Abi) -> PyResult<Condition> {
    let Some(filter) = filter else { return Ok(Condition::default()) };
    let class = filter.py().import("vmitap.filters")?.getattr("Filter")?;
    if !filter.is_instance(&class)? {
        let kind = filter.get_type().name()?;
        return Err(PyTypeError::new_err(format!("{what} is a vmitap.Filter, such as Arg(0) > 5, not {kind}")));
    }
    let mut predicates = Vec::new();
    let program = compile(what, filter, abi, &mut predicates)?;
    Ok(Condition { program: Some(Arc::new(program)), predicates })
}

/// What a write to a breakpoint's byte does.
#[derive(Clone, Default)]
pub struct WriteArg {
    /// Where no rule applies; `None`: as the session says.
    pub otherwise: Option<OnWrite>,
    pub rules: Vec<WriteRule>,
}

impl WriteArg {
    /// Whether somebody is to be asked about some write; `session` is what the session says.
    pub fn asks(&self, session: OnWrite) -> bool {
        self.otherwise.unwrap_or(session) == OnWrite::Ask || self.rules.iter().any(|rule| rule.then == OnWrite::Ask)
    }
}

/// An `on_write` argument: an `OnWrite`, a filter, or both composed.
pub fn write_policy(given: Option<&Bound<'_, PyAny>>, abi: Abi) -> PyResult<WriteArg> {
    let Some(given) = given else { return Ok(WriteArg::default()) };
    if let Ok(policy) = given.extract::<OnWriteArg>() {
        return Ok(WriteArg { otherwise: Some(policy.0), rules: Vec::new() });
    }
    let described = given.py().import("vmitap.policy")?.call_method1("_rules", (given,))?;
    let (rules, otherwise): (Vec<(Bound<'_, PyAny>, bool, OnWriteArg)>, OnWriteArg) = described.extract()?;
    let rule = |(filter, holds, then): (Bound<'_, PyAny>, bool, OnWriteArg)| {
        let mut asked = Vec::new();
        let program = compile("on_write", &filter, abi, &mut asked)?;
        if !asked.is_empty() {
            let reason = format!("{}: a predicate is for hits; for writes there is OnWrite.ASK with ask=", shown(&filter));
            return Err(invalid("on_write", reason));
        }
        Ok(WriteRule { when: Arc::new(program), holds, then: then.0 })
    };
    Ok(WriteArg { otherwise: Some(otherwise.0), rules: rules.into_iter().map(rule).collect::<PyResult<_>>()? })
}

/// Compiles what an expression describes.
pub fn compile(
    what: &'static str,
    expression: &Bound<'_, PyAny>,
    abi: Abi,
    predicates: &mut Vec<Py<PyAny>>,
) -> PyResult<Program> {
    let code = expression.getattr("_code")?;
    let nodes = code.try_iter()?.map(|step| node(&step?, predicates)).collect::<PyResult<Vec<_>>>()?;
    Program::compile(&nodes, abi).map_err(|error| match error {
        VmiError::InvalidArgument { reason, .. } => invalid(what, format!("{reason}, in {}", shown(expression))),
        error => error.into(),
    })
}

fn shown(expression: &Bound<'_, PyAny>) -> String {
    expression.repr().map_or_else(|_| "the expression".to_owned(), |text| text.to_string_lossy().into_owned())
}

fn node(step: &Bound<'_, PyAny>, predicates: &mut Vec<Py<PyAny>>) -> PyResult<Node> {
    let step = step.cast::<PyTuple>()?;
    let name = step.get_item(0)?;
    let name = name.cast::<PyString>()?.to_string_lossy();
    let at = |index: usize| step.get_item(index);
    let word = |index: usize| -> PyResult<String> { at(index)?.extract() };
    let unknown = || PyValueError::new_err(format!("no such step of an expression: {step}"));
    Ok(match &*name {
        "const" => Node::Const { value: at(1)?.extract::<i128>()? as u64, signed: at(2)?.extract()? },
        "register" => Node::Register(Register::named(&word(1)?).ok_or_else(unknown)?),
        "argument" => Node::Argument(at(1)?.extract()?),
        "vcpu" => Node::Vcpu,
        "address" => Node::Address,
        "load" => Node::Load { size: at(1)?.extract()? },
        "cast" => Node::Cast { bits: at(1)?.extract()?, signed: at(2)?.extract()? },
        "arith" => Node::Arith(arith(&word(1)?).ok_or_else(unknown)?),
        "compare" => Node::Compare(test(&word(1)?).ok_or_else(unknown)?),
        "one_of" => Node::OneOf(at(1)?.extract()?),
        "within" => Node::Within(at(1)?.extract()?, at(2)?.extract()?),
        "text" => {
            let kind = match &*word(1)? {
                "bytes" => TextKind::Bytes,
                "cstr" => TextKind::Cstr,
                "utf16" => TextKind::Utf16,
                _ => return Err(unknown()),
            };
            let test = match &*word(2)? {
                "equal" => TextTest::Equal,
                "startswith" => TextTest::StartsWith,
                "endswith" => TextTest::EndsWith,
                "contains" => TextTest::Contains,
                _ => return Err(unknown()),
            };
            Node::Text { kind, test, max: at(3)?.extract()?, pattern: at(4)?.extract()? }
        }
        "not" => Node::Not,
        "and" => Node::And,
        "or" => Node::Or,
        "every" => Node::Every(at(1)?.extract()?),
        "once" => Node::Once,
        "rate" => Node::Rate(at(1)?.extract()?),
        "predicate" => {
            let number = u16::try_from(predicates.len()).map_err(|_| invalid("where", "too many predicates"))?;
            predicates.push(at(1)?.unbind());
            Node::Ask(number)
        }
        _ => return Err(unknown()),
    })
}

fn arith(sign: &str) -> Option<Arith> {
    Some(match sign {
        "+" => Arith::Add,
        "-" => Arith::Sub,
        "*" => Arith::Mul,
        "//" => Arith::Div,
        "%" => Arith::Rem,
        "&" => Arith::And,
        "|" => Arith::Or,
        "^" => Arith::Xor,
        "<<" => Arith::Shl,
        ">>" => Arith::Shr,
        _ => return None,
    })
}

fn test(sign: &str) -> Option<Test> {
    Some(match sign {
        "==" => Test::Eq,
        "!=" => Test::Ne,
        "<" => Test::Lt,
        "<=" => Test::Le,
        ">" => Test::Gt,
        ">=" => Test::Ge,
        _ => return None,
    })
}

/// What is captured at the hits of a breakpoint.
pub struct Captured {
    pub entry: Plan,
    pub on_return: Option<Plan>,
}

/// The `capture` and `on_return` arguments.
pub fn captured(
    py: Python<'_>,
    capture: Option<&Bound<'_, PyAny>>,
    on_return: Option<&Bound<'_, PyAny>>,
    abi: Abi,
) -> PyResult<Option<Captured>> {
    if capture.is_none() && on_return.is_none() {
        return Ok(None);
    }
    let plan = |what, given: Option<&Bound<'_, PyAny>>| -> PyResult<Option<Plan>> {
        given.map(|given| Ok(Plan::new(columns(py, what, given, abi)?)?)).transpose()
    };
    let entry = plan("capture", capture)?;
    let entry = match entry {
        Some(entry) => entry,
        None => Plan::new(Vec::new())?,
    };
    Ok(Some(Captured { entry, on_return: plan("on_return", on_return)? }))
}

fn columns(py: Python<'_>, what: &'static str, given: &Bound<'_, PyAny>, abi: Abi) -> PyResult<Vec<Column>> {
    let described = py.import("vmitap.capture")?.call_method1("_columns", (what, given))?;
    let described: Vec<(String, String, u32, Bound<'_, PyAny>)> = described.extract()?;
    let column = |(name, kind, size, expression): (String, String, u32, Bound<'_, PyAny>)| {
        let program = || compile(what, &expression, abi, &mut Vec::new());
        let source = match &*kind {
            "number" => Source::Number { program: program()?, bytes: size as u8 },
            "bytes" => Source::Bytes { at: program()?, len: size },
            "cstr" => Source::Cstr { at: program()?, max: size },
            "utf16" => Source::Utf16 { at: program()?, max: size },
            "backtrace" => Source::Backtrace { depth: size as u8 },
            _ => return Err(PyValueError::new_err(format!("no such column: {kind}"))),
        };
        Ok(Column { name, source })
    };
    described.into_iter().map(column).collect()
}
