//! Configuration from the environment: read once, through a trait, with every problem reported together.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fmt,
    str::FromStr,
    time::Duration,
};

/// Where variables come from; tests pass a map.
pub trait Vars {
    /// The value of `name`; `None` when unset or not UTF-8.
    fn var(&self, name: &str) -> Option<String>;

    /// Every variable whose name starts with `prefix`, in order of name.
    fn with_prefix(&self, prefix: &str) -> BTreeMap<String, String>;
}

/// The process environment.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessEnv;

impl Vars for ProcessEnv {
    fn var(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn with_prefix(&self, prefix: &str) -> BTreeMap<String, String> {
        // `vars_os`: a stray non-UTF-8 variable must not take the process down.
        std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
            .filter(|(k, _)| k.starts_with(prefix))
            .collect()
    }
}

impl Vars for HashMap<String, String> {
    fn var(&self, name: &str) -> Option<String> {
        self.get(name).cloned()
    }

    fn with_prefix(&self, prefix: &str) -> BTreeMap<String, String> {
        self.iter().filter(|(k, _)| k.starts_with(prefix)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// One variable that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub variable: String,
    pub value: String,
    /// What would be right.
    pub expected: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=`{}`: expected {}", self.variable, self.value, self.expected)
    }
}

/// Every problem of one environment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid configuration in the environment:")?;
        self.0.iter().try_for_each(|p| write!(f, "\n  {p}"))
    }
}

/// Typed access to variables. A bad value yields the default and a [`Problem`]; [`Reader::finish`] reports all of them, so nothing
/// runs half-configured.
pub struct Reader<'a> {
    vars: &'a dyn Vars,
    problems: RefCell<Vec<Problem>>,
}

impl<'a> Reader<'a> {
    pub fn new(vars: &'a dyn Vars) -> Self {
        Self { vars, problems: RefCell::new(Vec::new()) }
    }

    /// Set and non-empty, or `None`.
    pub fn optional(&self, name: &str) -> Option<String> {
        self.vars.var(name).filter(|v| !v.is_empty())
    }

    /// Set, possibly to the empty string, or `None`.
    pub fn raw(&self, name: &str) -> Option<String> {
        self.vars.var(name)
    }

    pub fn string(&self, name: &str, default: &str) -> String {
        self.optional(name).unwrap_or_else(|| default.to_owned())
    }

    /// A variable that has no default.
    pub fn required(&self, name: &str, expected: &str) -> String {
        self.optional(name).unwrap_or_else(|| {
            self.problem(name, "", expected);
            String::new()
        })
    }

    pub fn bool(&self, name: &str, default: bool) -> bool {
        self.optional_bool(name).unwrap_or(default)
    }

    pub fn optional_bool(&self, name: &str) -> Option<bool> {
        match self.optional(name)?.as_str() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            other => {
                self.problem(name, other, "true or false");
                None
            }
        }
    }

    /// A duration such as `250ms`, `5s`, `10m`, `24h`, `7d`.
    pub fn duration(&self, name: &str, default: Duration) -> Duration {
        self.optional_duration(name).unwrap_or(default)
    }

    pub fn optional_duration(&self, name: &str) -> Option<Duration> {
        let value = self.optional(name)?;
        let parsed = parse_duration(&value);
        if parsed.is_none() {
            self.problem(name, &value, "a duration such as 250ms, 5s, 10m or 24h");
        }
        parsed
    }

    /// Anything that parses; `expected` tells the user what would.
    pub fn parse<T: FromStr>(&self, name: &str, default: T, expected: &str) -> T {
        self.optional_parse(name, expected).unwrap_or(default)
    }

    pub fn optional_parse<T: FromStr>(&self, name: &str, expected: &str) -> Option<T> {
        let value = self.optional(name)?;
        let parsed = value.parse().ok();
        if parsed.is_none() {
            self.problem(name, &value, expected);
        }
        parsed
    }

    pub fn with_prefix(&self, prefix: &str) -> BTreeMap<String, String> {
        self.vars.with_prefix(prefix)
    }

    /// Records a problem found by the caller.
    pub fn problem(&self, variable: &str, value: &str, expected: &str) {
        let value = value.chars().take(200).collect();
        self.problems.borrow_mut().push(Problem {
            variable: variable.to_owned(),
            value,
            expected: expected.to_owned(),
        });
    }

    /// # Errors
    /// Every problem met, in the order of reading.
    pub fn finish(self) -> Result<(), Problems> {
        let problems = self.problems.into_inner();
        if problems.is_empty() { Ok(()) } else { Err(Problems(problems)) }
    }
}

/// `<number><unit>` terms, added up: `ns`, `us`, `ms`, `s`, `m`, `h`, `d`; fractions allowed (`1.5h`).
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit_len = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let seconds = match &rest[..unit_len] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &rest[unit_len..];
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn reports_every_problem_with_variable_value_and_remedy() {
        let vars = vars(&[("A", "maybe"), ("B", "5 parsecs"), ("C", "70000")]);
        let reader = Reader::new(&vars);
        assert!(reader.bool("A", true));
        assert_eq!(reader.duration("B", Duration::from_secs(3)), Duration::from_secs(3));
        assert_eq!(reader.parse("C", 80u16, "a port, 1 to 65535"), 80);
        reader.required("D", "the node's name");
        let text = reader.finish().unwrap_err().to_string();
        for wanted in ["A=`maybe`: expected true or false", "B=`5 parsecs`", "C=`70000`: expected a port", "D=``"] {
            assert!(text.contains(wanted), "{wanted} missing from {text}");
        }
    }

    #[test]
    fn durations_add_up_and_refuse_nonsense() {
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        for bad in ["", "5", "s", "5x", "-1s", "1..2s", "99999999999999999999d"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn empty_counts_as_unset_except_raw() {
        let vars = vars(&[("X", "")]);
        let reader = Reader::new(&vars);
        assert_eq!(reader.optional("X"), None);
        assert_eq!(reader.raw("X"), Some(String::new()));
        reader.finish().unwrap();
    }
}
