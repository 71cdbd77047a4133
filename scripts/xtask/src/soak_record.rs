// SPDX-License-Identifier: GPL-2.0

//! What a soak writes down: the host's memory and the module's figures over time, as text; whether any
//! of it grew; and a picture.
//!
//! Like is compared with like: only what was seen with no guest there counts for the verdict, and of that
//! nothing of the first quarter, in which caches of the kernel and tables of the module fill. What is
//! left gets a line through it (Theil and Sen: the median of all slopes, which a few odd values do not
//! bend). It grows if both that line and the medians of its first and last third rise by more than a
//! figure moves anyway.

use anyhow::{bail, ensure, Context, Result};
use std::fmt::Write;

/// One figure of the record.
pub struct Figure {
    /// Its name in the record.
    pub name: &'static str,
    /// What it moves by from round to round without any reason that would last; `None` if it says
    /// nothing once the guests are gone.
    pub slack: Option<f64>,
}

const fn judged(name: &'static str, slack: f64) -> Figure {
    Figure {
        name,
        slack: Some(slack),
    }
}

const fn shown(name: &'static str) -> Figure {
    Figure { name, slack: None }
}

/// What is written down, in this order.
pub const FIGURES: [Figure; 9] = [
    // All but what MemAvailable and the lists of each CPU have.
    judged("taken_kb", 2048.0),
    judged("slab_kb", 1024.0),
    judged("kernel_kb", 512.0),
    judged("metadata_kb", 64.0),
    shown("resident_kb"),
    shown("saved_kb"),
    shown("compressed_kb"),
    shown("swapped_kb"),
    shown("vms"),
];

/// One look.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Since the soak began.
    pub seconds: f64,
    /// No guest was there, and the kernel's caches were dropped.
    pub idle: bool,
    /// In the order of [`FIGURES`].
    pub values: [f64; FIGURES.len()],
}

/// The first line of a record.
pub fn head() -> String {
    let names = FIGURES.map(|figure| figure.name);
    format!("seconds\tidle\t{}\n", names.join("\t"))
}

impl Sample {
    /// As a line of the record.
    pub fn line(&self) -> String {
        let mut line = format!("{:.1}\t{}", self.seconds, u8::from(self.idle));
        for value in self.values {
            // Writing to a string cannot fail.
            let _ = write!(line, "\t{value}");
        }
        line + "\n"
    }
}

/// Reads a record.
pub fn parse(text: &str) -> Result<Vec<Sample>> {
    let mut lines = text.lines();
    let first = lines.next().context("the record is empty")?;
    ensure!(
        first == head().trim_end(),
        "the record begins with {first:?}"
    );
    let mut samples = Vec::new();
    for (number, line) in lines.enumerate() {
        let bad = || format!("line {} of the record: {line:?}", number + 2);
        let words: Vec<f64> = line
            .split('\t')
            .map(|word| word.parse().with_context(bad))
            .collect::<Result<_>>()?;
        let [seconds, idle, values @ ..] = &words[..] else {
            bail!(bad());
        };
        samples.push(Sample {
            seconds: *seconds,
            idle: *idle == 1.0,
            values: values.try_into().with_context(bad)?,
        });
    }
    Ok(samples)
}

/// Fewer looks without guests than this say nothing.
pub const LEAST: usize = 6;

/// How a figure went, with no guest there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trend {
    /// Medians of its first and its last third.
    pub first: f64,
    pub last: f64,
    /// What the line through all of it rises by, from the first to the last.
    pub rise: f64,
    /// What it may rise by.
    pub allowed: f64,
    /// Where the line begins.
    pub from: (f64, f64),
    /// And where it ends.
    pub to: (f64, f64),
}

impl Trend {
    /// It rose by more than it moves anyway.
    pub fn grows(&self) -> bool {
        // From the middle of the first third to that of the last it is two thirds of the way.
        self.rise > self.allowed && self.last - self.first > self.allowed * 2.0 / 3.0
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// How the `at`th figure went. An error with too few looks.
pub fn trend(samples: &[Sample], at: usize) -> Result<Trend> {
    let idle: Vec<(f64, f64)> = samples
        .iter()
        .filter(|sample| sample.idle)
        .map(|sample| (sample.seconds, sample.values[at]))
        .collect();
    ensure!(
        idle.len() >= LEAST,
        "only {} looks without a guest: too few, let it run for longer",
        idle.len()
    );
    let settled = &idle[idle.len() / 4..];
    let third = settled.len().div_ceil(3);
    let middle = |part: &[(f64, f64)]| median(part.iter().map(|(_, value)| *value).collect());
    let (first, last) = (
        middle(&settled[..third]),
        middle(&settled[settled.len() - third..]),
    );
    let mut slopes = Vec::new();
    for (i, (then, before)) in settled.iter().enumerate() {
        let later = settled[i + 1..].iter().filter(|(now, _)| now > then);
        slopes.extend(later.map(|(now, after)| (after - before) / (now - then)));
    }
    let slope = median(slopes);
    let level = median(settled.iter().map(|(x, y)| y - slope * x).collect());
    // What it moves by around the line: the median of that, for a normal distribution.
    let noise = 1.4826
        * median(
            settled
                .iter()
                .map(|(x, y)| (y - level - slope * x).abs())
                .collect(),
        );
    let (begin, end) = (settled[0].0, settled[settled.len() - 1].0);
    Ok(Trend {
        first,
        last,
        rise: slope * (end - begin),
        allowed: FIGURES[at].slack.unwrap_or(f64::INFINITY) + 2.0 * noise,
        from: (begin, level + slope * begin),
        to: (end, level + slope * end),
    })
}

/// A table of the trends, and the names of the figures that grew.
pub fn verdict(samples: &[Sample]) -> Result<(String, Vec<&'static str>)> {
    let mut table = format!(
        "{:<14}{:>12}{:>12}{:>10}{:>10}\n",
        "without guests", "first third", "last third", "line", "allowed"
    );
    let mut grew = Vec::new();
    for (at, figure) in FIGURES.iter().enumerate() {
        if figure.slack.is_none() {
            continue;
        }
        let trend = trend(samples, at)?;
        let Trend {
            first,
            last,
            rise,
            allowed,
            ..
        } = trend;
        let _ = writeln!(
            table,
            "{:<14}{first:>12.0}{last:>12.0}{rise:>+10.0}{allowed:>10.0}{}",
            figure.name,
            if trend.grows() { "  GROWS" } else { "" }
        );
        if trend.grows() {
            grew.push(figure.name);
        }
    }
    Ok((table, grew))
}

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 150.0;
const LEFT: f64 = 90.0;
const GAP: f64 = 40.0;

/// The figures of each panel of the picture, with a colour each.
const PANELS: [(&str, &[(&str, &str)]); 4] = [
    (
        "taken of the host's memory, KiB",
        &[("taken_kb", "#1f77b4")],
    ),
    (
        "guests, KiB",
        &[
            ("resident_kb", "#d62728"),
            ("saved_kb", "#2ca02c"),
            ("compressed_kb", "#9467bd"),
            ("swapped_kb", "#8c564b"),
        ],
    ),
    ("the module's tables, KiB", &[("metadata_kb", "#ff7f0e")]),
    (
        "the kernel's own, KiB",
        &[("slab_kb", "#7f7f7f"), ("kernel_kb", "#17becf")],
    ),
];

/// A picture (SVG) of the record: a panel for each kind of figure, lines over time, a dot for each look
/// without guests, and the line through those.
pub fn picture(samples: &[Sample], title: &str) -> String {
    let end = samples.last().map_or(1.0, |sample| sample.seconds.max(1.0));
    let total = 30.0 + (HEIGHT + GAP) * PANELS.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{total}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"16\" font-size=\"13\">{title}</text>\n",
        LEFT + WIDTH + 20.0
    );
    for (number, (label, figures)) in PANELS.iter().enumerate() {
        let top = 30.0 + (HEIGHT + GAP) * number as f64 + 14.0;
        panel(&mut svg, samples, end, top, label, figures);
    }
    svg + "</svg>\n"
}

fn panel(
    svg: &mut String,
    samples: &[Sample],
    end: f64,
    top: f64,
    label: &str,
    figures: &[(&str, &str)],
) {
    let index = |name: &str| FIGURES.iter().position(|figure| figure.name == name);
    let shown: Vec<(usize, &str, &str)> = figures
        .iter()
        .filter_map(|(name, colour)| Some((index(name)?, *name, *colour)))
        .collect();
    let values = || {
        let all = samples
            .iter()
            .flat_map(|sample| sample.values.iter().enumerate());
        all.filter(|(at, _)| shown.iter().any(|(wanted, ..)| wanted == at))
            .map(|(_, value)| *value)
    };
    let low = values().fold(f64::INFINITY, f64::min).min(1e12);
    let high = values().fold(low + 1.0, f64::max);
    let x = |seconds: f64| LEFT + WIDTH * seconds / end;
    let y = |value: f64| top + HEIGHT * (high - value) / (high - low);
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" \
         stroke=\"#ccc\"/>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{high:.0}</text>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{low:.0}</text>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{end:.0} s</text>\n\
         <text x=\"{LEFT}\" y=\"{}\">{label}</text>",
        LEFT - 4.0,
        top + 10.0,
        LEFT - 4.0,
        top + HEIGHT,
        LEFT + WIDTH,
        top + HEIGHT + 13.0,
        top - 4.0,
    );
    for (number, (at, name, colour)) in shown.into_iter().enumerate() {
        let mut points = String::new();
        for sample in samples {
            let (x, y) = (x(sample.seconds), y(sample.values[at]));
            let _ = write!(points, "{x:.1},{y:.1} ");
        }
        let legend = LEFT + 250.0 + 130.0 * number as f64;
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>\n\
             <text x=\"{legend}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
            points.trim_end(),
            top - 4.0,
        );
        if FIGURES[at].slack.is_none() {
            continue;
        }
        for sample in samples.iter().filter(|sample| sample.idle) {
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{colour}\"/>",
                x(sample.seconds),
                y(sample.values[at])
            );
        }
        if let Ok(trend) = trend(samples, at) {
            let _ = writeln!(
                svg,
                "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"black\" \
                 stroke-dasharray=\"4 3\"/>",
                x(trend.from.0),
                y(trend.from.1),
                x(trend.to.0),
                y(trend.to.1)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A soak of `rounds`, one every ten seconds, in which each figure is what `value` says of the
    /// round, and guests take 100 MiB in between.
    fn soak(rounds: u32, value: impl Fn(u32) -> f64) -> Vec<Sample> {
        let mut samples = Vec::new();
        for round in 0..rounds {
            for idle in [false, true] {
                let seconds = f64::from(round) * 10.0 + if idle { 9.0 } else { 4.0 };
                let guests = if idle { 0.0 } else { 102_400.0 };
                samples.push(Sample {
                    seconds,
                    idle,
                    values: [value(round) + guests; FIGURES.len()],
                });
            }
        }
        samples
    }

    fn grew(samples: &[Sample]) -> Vec<&'static str> {
        verdict(samples).expect("enough looks").1
    }

    fn judged_names() -> Vec<&'static str> {
        let judged = FIGURES.iter().filter(|figure| figure.slack.is_some());
        judged.map(|figure| figure.name).collect()
    }

    /// From -1 to 1, the same each time.
    fn wobble(round: u32) -> f64 {
        f64::from((round.wrapping_mul(2_654_435_761) >> 16) & 0xff) / 127.5 - 1.0
    }

    #[test]
    fn a_leak_is_noticed() {
        // 200 KiB in each of 30 rounds, in a figure that moves by as much.
        let leak = soak(30, |round| {
            500_000.0 + 200.0 * f64::from(round) + 200.0 * wobble(round)
        });
        assert_eq!(grew(&leak), judged_names());
        // Much less, for as long as an hour.
        let slow = soak(360, |round| {
            500_000.0 + 12.0 * f64::from(round) + 300.0 * wobble(round)
        });
        assert_eq!(grew(&slow), judged_names());
    }

    #[test]
    fn a_leak_of_the_tables_alone_is_named() {
        let mut samples = soak(20, |_| 5000.0);
        let at = FIGURES.iter().position(|f| f.name == "metadata_kb");
        for sample in &mut samples {
            sample.values[at.expect("a figure")] += sample.seconds;
        }
        assert_eq!(grew(&samples), ["metadata_kb"]);
    }

    #[test]
    fn what_moves_about_or_fills_at_first_does_not_grow() {
        let none: [&str; 0] = [];
        assert_eq!(grew(&soak(30, |_| 500_000.0)), none);
        let wobbles = soak(30, |round| 500_000.0 + 3000.0 * wobble(round));
        assert_eq!(grew(&wobbles), none);
        let fills = soak(30, |round| 500_000.0 + f64::from(round.min(6)) * 5000.0);
        assert_eq!(grew(&fills), none);
        let falls = soak(30, |round| 500_000.0 - 1000.0 * f64::from(round));
        assert_eq!(grew(&falls), none);
        // Twice something else took memory, and gave it back.
        let peaks = soak(30, |round| {
            let peak = if round % 11 == 10 { 50_000.0 } else { 0.0 };
            500_000.0 + peak
        });
        assert_eq!(grew(&peaks), none);
    }

    #[test]
    fn guests_that_are_there_do_not_count() {
        let mut samples = soak(12, |_| 500_000.0);
        for sample in samples.iter_mut().filter(|sample| !sample.idle) {
            sample.values = sample.values.map(|v| v + 10_000.0 * sample.seconds);
        }
        assert!(grew(&samples).is_empty());
    }

    #[test]
    fn too_few_rounds_are_no_verdict() {
        assert!(verdict(&soak(LEAST as u32 - 1, |_| 1.0)).is_err());
        assert!(verdict(&[]).is_err());
    }

    #[test]
    fn the_picture_shows_every_look() {
        let samples = soak(10, f64::from);
        let svg = picture(&samples, "a soak");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<polyline").count(), 8);
        // A dot for each look without guests, in each figure that is judged, and a line through them.
        let judged = judged_names().len();
        assert_eq!(svg.matches("<circle").count(), 10 * judged);
        assert_eq!(svg.matches("stroke-dasharray").count(), judged);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(!picture(&[], "nothing").contains("NaN"));
    }

    #[test]
    fn a_bad_record_is_an_error() {
        let good = head() + &soak(1, |_| 1.5)[0].line();
        assert_eq!(parse(&good).expect("good").len(), 1);
        for bad in [
            "",
            "seconds\tidle\n",
            &(head() + "1\t0\t3\n"),
            &(good + "x\n"),
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            rows in proptest::collection::vec((0u32..100_000, any::<bool>(), 0u32..u32::MAX), 0..20)
        ) {
            let samples: Vec<Sample> = rows
                .into_iter()
                .map(|(tenths, idle, value)| Sample {
                    seconds: f64::from(tenths) / 10.0,
                    idle,
                    values: std::array::from_fn(|i| f64::from(value / (i as u32 + 1))),
                })
                .collect();
            let text = samples.iter().fold(head(), |text, sample| text + &sample.line());
            prop_assert_eq!(parse(&text).unwrap(), samples);
        }

        #[test]
        fn a_steady_leak_is_noticed_whatever_the_noise(
            noise in proptest::collection::vec(-1.0f64..1.0, 40),
            size in 100.0f64..4000.0,
        ) {
            // Eight times what it moves by, over all rounds.
            let leak = (size * 8.0 + 8000.0) / 40.0;
            let samples = soak(40, |round| {
                5e5 + leak * f64::from(round) + size * noise[round as usize]
            });
            prop_assert_eq!(grew(&samples), judged_names());
        }
    }
}
