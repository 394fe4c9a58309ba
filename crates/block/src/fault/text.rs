// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules as text, for command lines and monitors.

use std::str::FromStr;
use std::time::Duration;

use super::{Fault, Order, Point, Rule};
use crate::error::Error;
use crate::op::OpKind;

const KEYS: &str = "fault, errno, delay-ns, op, skip, count, point";

/// The properties of a rule as they were given.
#[derive(Default)]
struct Given<'a> {
    fault: Option<&'a str>,
    errno: Option<i32>,
    delay: Option<Duration>,
    op: Option<OpKind>,
    skip: Option<u64>,
    count: Option<u64>,
    point: Option<Point>,
}

impl FromStr for Rule {
    type Err = Error;

    /// `fault=fail,errno=5`, `fault=delay,delay-ns=N`, `fault=jitter,delay-ns=N` or `fault=hold`; with `op=`(`read`,
    /// `write`, `flush`, `discard`, `write-zeroes`; all without it), `skip=N` (0), `count=N` (all from then on) and
    /// `point=`(`before`, `begun`, `after`).
    fn from_str(text: &str) -> Result<Rule, Error> {
        let parsed = text
            .split(',')
            .try_fold(Given::default(), Given::with)
            .and_then(Given::rule);
        parsed.map_err(|reason| Error::FaultRule {
            rule: text.to_owned(),
            reason,
        })
    }
}

impl<'a> Given<'a> {
    fn with(mut self, property: &'a str) -> Result<Given<'a>, String> {
        let (key, value) = property
            .split_once('=')
            .ok_or_else(|| format!("'{property}' is not KEY=VALUE; keys are {KEYS}"))?;
        match key {
            "fault" => self.fault = Some(value),
            "errno" => {
                let errno = value.parse().ok().filter(|errno| (1..4096).contains(errno));
                self.errno =
                    Some(errno.ok_or_else(|| format!("errno={value}: not from 1 to 4095"))?);
            }
            "delay-ns" => self.delay = Some(Duration::from_nanos(number(key, value)?)),
            "op" => self.op = Some(kind(value)?),
            "skip" => self.skip = Some(number(key, value)?),
            "count" => self.count = Some(number(key, value)?),
            "point" => self.point = Some(point(value)?),
            _ => return Err(format!("unknown key '{key}'; keys are {KEYS}")),
        }
        Ok(self)
    }

    fn rule(self) -> Result<Rule, String> {
        let delay = || self.delay.ok_or("delay-ns is missing");
        let fault = match self.fault {
            Some("fail") => Fault::Fail(self.errno.ok_or("errno is missing")?),
            Some("delay") => Fault::Delay(delay()?),
            Some("jitter") => Fault::Jitter(delay()?),
            Some("hold") => Fault::Hold,
            Some(other) => {
                return Err(format!("fault={other}: it is fail, delay, jitter or hold"));
            }
            None => return Err("fault is missing: fail, delay, jitter or hold".to_owned()),
        };
        Ok(Rule {
            kind: self.op,
            skip: self.skip.unwrap_or(0),
            count: self.count.unwrap_or(u64::MAX),
            fault,
            point: self.point.unwrap_or_default(),
        })
    }
}

impl FromStr for Order {
    type Err = Error;

    /// `arrival`, `reverse` or `shuffled:SEED`.
    fn from_str(text: &str) -> Result<Order, Error> {
        let seed = text.strip_prefix("shuffled:").map(str::parse);
        match (text, seed) {
            ("arrival", _) => Ok(Order::Arrival),
            ("reverse", _) => Ok(Order::Reverse),
            (_, Some(Ok(seed))) => Ok(Order::Shuffled { seed }),
            _ => Err(Error::FaultRule {
                rule: text.to_owned(),
                reason: "an order is arrival, reverse or shuffled:SEED".to_owned(),
            }),
        }
    }
}

fn number(key: &str, value: &str) -> Result<u64, String> {
    let parsed = value.parse();
    parsed.map_err(|_| format!("{key}={value}: not a whole number"))
}

fn kind(value: &str) -> Result<OpKind, String> {
    match value {
        "read" => Ok(OpKind::Read),
        "write" => Ok(OpKind::Write),
        "flush" => Ok(OpKind::Flush),
        "discard" => Ok(OpKind::Discard),
        "write-zeroes" => Ok(OpKind::WriteZeroes),
        _ => Err(format!(
            "op={value}: it is read, write, flush, discard or write-zeroes"
        )),
    }
}

fn point(value: &str) -> Result<Point, String> {
    match value {
        "before" => Ok(Point::Before),
        "begun" => Ok(Point::Begun),
        "after" => Ok(Point::After),
        _ => Err(format!("point={value}: it is before, begun or after")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read() {
        let rule: Rule = "fault=fail,errno=28,op=write,skip=2,count=3"
            .parse()
            .unwrap();
        assert_eq!(rule.fault, Fault::Fail(28));
        assert_eq!(
            (rule.kind, rule.skip, rule.count),
            (Some(OpKind::Write), 2, 3)
        );
        let rule: Rule = "point=after,fault=jitter,delay-ns=20000000000"
            .parse()
            .unwrap();
        assert_eq!(rule.fault, Fault::Jitter(Duration::from_secs(20)));
        assert_eq!((rule.kind, rule.count), (None, u64::MAX));
        assert_eq!(rule.point, Point::After);
        let rule: Rule = "fault=hold,point=begun".parse().unwrap();
        assert_eq!(rule.point, Point::Begun);
        assert_eq!("fault=hold".parse::<Rule>().unwrap().fault, Fault::Hold);
    }

    #[test]
    fn bad_rules_are_named() {
        for (rule, part) in [
            ("", "'' is not KEY=VALUE"),
            ("errno=5", "fault is missing"),
            ("fault=explode", "fault=explode"),
            ("fault=fail", "errno is missing"),
            ("fault=fail,errno=0", "errno=0"),
            ("fault=delay", "delay-ns is missing"),
            ("fault=hold,op=trim", "op=trim"),
            ("fault=hold,count=-1", "count=-1"),
            ("fault=hold,point=x", "point=x"),
            ("fault=hold,colour=red", "unknown key 'colour'"),
        ] {
            let error = rule.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(rule), "{error}");
        }
    }

    #[test]
    fn orders_are_read() {
        assert_eq!("reverse".parse::<Order>().unwrap(), Order::Reverse);
        let shuffled = "shuffled:7".parse::<Order>().unwrap();
        assert_eq!(shuffled, Order::Shuffled { seed: 7 });
        assert!("shuffled:x".parse::<Order>().is_err());
        assert!("sideways".parse::<Order>().is_err());
    }
}
