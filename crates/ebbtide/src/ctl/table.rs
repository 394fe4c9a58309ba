// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Columns of text.

/// One column: its heading, and on which side its cells stand.
#[derive(Clone, Copy)]
pub(super) enum Column {
    Left(&'static str),
    Right(&'static str),
}

/// Rows under their headings, each column as wide as its widest cell, two spaces apart.
pub(super) fn table(columns: &[Column], rows: &[Vec<String>]) -> String {
    let headings: Vec<String> = columns
        .iter()
        .map(|column| match column {
            Column::Left(heading) | Column::Right(heading) => (*heading).to_owned(),
        })
        .collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&headings).chain(rows).collect();
    let width = |at: usize| {
        lines
            .iter()
            .filter_map(|line| line.get(at))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let cells = line
            .iter()
            .zip(columns)
            .zip(&widths)
            .map(|((cell, column), &width)| match column {
                Column::Left(_) => format!("{cell:<width$}"),
                Column::Right(_) => format!("{cell:>width$}"),
            });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let columns = [
            Column::Left("ID"),
            Column::Right("SIZE"),
            Column::Left("TYPE"),
        ];
        let rows = [
            vec!["vmem0".into(), "1 GiB".into(), "x".into()],
            vec!["v".into(), "512 MiB".into(), "long".into()],
        ];
        assert_eq!(
            table(&columns, &rows),
            "ID        SIZE  TYPE\n\
             vmem0    1 GiB  x\n\
             v      512 MiB  long\n"
        );
    }
}
