//! The user's message type: `.proto` files compiled in this process, messages to JSON and back.
//!
//! JSON here is always protobuf's own JSON mapping, one object per line. No protoc, no generated code.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};

use miette::Diagnostic as _;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

/// One message type, and with it every type that its files import.
#[derive(Clone)]
pub(crate) struct Schema {
    message_type: MessageDescriptor,
}

impl Schema {
    /// Compiles `files` and finds `message_type` in them.
    ///
    /// Imports are looked for in `includes`, and beside a file that is in none of them: a schema that stands alone needs
    /// no include.
    pub(crate) fn load(files: &[PathBuf], includes: &[PathBuf], message_type: &str) -> Result<Schema, SchemaError> {
        let pool = compile(files, includes)?;
        // A leading dot is protobuf's own way to write a full name.
        let name = message_type.strip_prefix('.').unwrap_or(message_type);
        match pool.get_message_by_name(name) {
            Some(message_type) => Ok(Schema { message_type }),
            None => Err(SchemaError::NoSuchType { wanted: name.to_owned(), known: own_types(&pool, files) }),
        }
    }

    /// Appends the message, which is this type's encoding, to `out` as one JSON object without a newline.
    pub(crate) fn decode(&self, message: &[u8], out: &mut Vec<u8>) -> Result<(), JsonError> {
        let start = out.len();
        let decoded = DynamicMessage::decode(self.message_type.clone(), message).map_err(JsonError::Decode)?;
        serde_json::to_writer(&mut *out, &decoded).map_err(|error| {
            out.truncate(start);
            JsonError::Write(error)
        })
    }

    /// Replaces what `out` holds by the encoding of the JSON object in `text`.
    pub(crate) fn encode(&self, text: &[u8], out: &mut Vec<u8>) -> Result<(), JsonError> {
        let mut json = serde_json::Deserializer::from_slice(text);
        let message = DynamicMessage::deserialize(self.message_type.clone(), &mut json).map_err(JsonError::Read)?;
        json.end().map_err(JsonError::Read)?;
        out.clear();
        message.encode(out).expect("a Vec grows");
        Ok(())
    }

    pub(crate) fn name(&self) -> &str {
        self.message_type.full_name()
    }
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Schema").field(&self.name()).finish()
    }
}

fn compile(files: &[PathBuf], includes: &[PathBuf]) -> Result<DescriptorPool, SchemaError> {
    // Compared as absolute paths, so that `./a.proto` is found in `.` and in the whole path of the same directory alike.
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut roots: Vec<PathBuf> = includes.iter().map(|include| absolute(include)).collect();
    let mut wanted = Vec::new();
    for file in files {
        if !file.is_file() {
            // As an import is written, then: relative to one of the includes.
            wanted.push(file.clone());
            continue;
        }
        let file = absolute(file);
        if !roots.iter().any(|root| file.starts_with(root)) {
            roots.extend(file.parent().map(Path::to_owned));
        }
        wanted.push(file);
    }
    let mut compiler = protox::Compiler::new(roots).map_err(SchemaError::Compile)?;
    compiler.include_imports(true).include_source_info(false);
    for (file, wanted) in files.iter().zip(wanted) {
        compiler.open_file(wanted).map_err(|error| {
            // An import that is missing has a place, and it is told.
            match error.is_file_not_found() && error.labels().is_none() && !file.is_file() {
                true => SchemaError::NoSuchFile { file: file.clone(), includes: includes.to_vec() },
                false => SchemaError::Compile(error),
            }
        })?;
    }
    Ok(compiler.descriptor_pool())
}

/// The message types that `files` themselves define, to tell the user what could have been meant.
fn own_types(pool: &DescriptorPool, files: &[PathBuf]) -> Vec<String> {
    let is_own = |name: &str| files.iter().any(|file| file.ends_with(name) || Path::new(name).ends_with(file));
    pool.all_messages()
        .filter(|message| is_own(message.parent_file().name()) && !message.is_map_entry())
        .map(|message| message.full_name().to_owned())
        .collect()
}

/// Why a schema cannot be used.
#[derive(Debug)]
pub(crate) enum SchemaError {
    NoSuchFile { file: PathBuf, includes: Vec<PathBuf> },
    Compile(protox::Error),
    NoSuchType { wanted: String, known: Vec<String> },
}

impl fmt::Display for SchemaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SchemaError::NoSuchFile { file, includes } => {
                write!(f, "{}: there is no such file", file.display())?;
                includes.iter().try_for_each(|include| write!(f, ", nor in {}", include.display()))
            }
            SchemaError::Compile(error) => {
                if let Some(file) = error.file() {
                    write!(f, "{file}:")?;
                    if let Some((line, column)) = place(error) {
                        write!(f, "{line}:{column}:")?;
                    }
                    f.write_str(" ")?;
                }
                write!(f, "{error}")?;
                error.source().map_or(Ok(()), |source| write!(f, ": {source}"))
            }
            SchemaError::NoSuchType { wanted, known } if known.is_empty() => {
                write!(f, "there is no message type `{wanted}` in these files")
            }
            SchemaError::NoSuchType { wanted, known } => {
                write!(f, "there is no message type `{wanted}` in these files, which have: {}", known.join(", "))
            }
        }
    }
}

impl Error for SchemaError {}

/// Where in its file it stands: line and column, from 1.
fn place(error: &protox::Error) -> Option<(usize, usize)> {
    let label = error.labels()?.next()?;
    let there = error.source_code()?.read_span(label.inner(), 0, 0).ok()?;
    Some((there.line() + 1, there.column() + 1))
}

/// Why a message could not become JSON, or JSON a message.
#[derive(Debug)]
pub(crate) enum JsonError {
    Decode(prost::DecodeError),
    Read(serde_json::Error),
    Write(serde_json::Error),
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JsonError::Decode(error) => write!(f, "{error}"),
            JsonError::Read(error) | JsonError::Write(error) => write!(f, "{error}"),
        }
    }
}

impl Error for JsonError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed() -> Schema {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gtfs-realtime/gtfs-realtime.proto");
        Schema::load(&[file.into()], &[], "transit_realtime.FeedMessage").unwrap()
    }

    #[test]
    fn json_becomes_the_message_and_back() {
        let json = br#"{"header":{"gtfsRealtimeVersion":"2.0","timestamp":"1284457468"}}"#;
        let (mut message, mut text) = (Vec::new(), Vec::new());
        feed().encode(json, &mut message).unwrap();
        assert_eq!(message, b"\x0a\x0b\x0a\x032.0\x18\xfc\x87\xbd\xe4\x04");
        feed().decode(&message, &mut text).unwrap();
        assert_eq!(text, json);
    }

    #[test]
    fn what_does_not_fit_the_type_is_an_error_and_leaves_nothing_behind() {
        let mut out = b"before".to_vec();
        for text in ["{\"nothing\":1}", "{\"header\":3}", "{} {}", "[]", "{", ""] {
            assert!(feed().encode(text.as_bytes(), &mut out).is_err(), "{text}");
        }
        assert!(feed().decode(b"\x0a\x7f", &mut out).is_err());
        assert_eq!(out, b"before");
    }

    #[test]
    fn what_is_wrong_in_a_file_is_told_with_its_place_and_a_file_that_is_not_there_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let load = |name: &str, content: &str, includes: &[PathBuf]| {
            let file = folder.path().join(name);
            std::fs::write(&file, content).unwrap();
            Schema::load(&[file], includes, "M").unwrap_err().to_string()
        };
        let head = "syntax = \"proto3\";\n";
        let error = load("syntax.proto", &format!("{head}message M {{\n  string name 1;\n}}\n"), &[]);
        assert!(error.starts_with("syntax.proto:3:15: ") && error.contains("expected"), "{error}");
        let error = load("type.proto", &format!("{head}message M {{ Nothing name = 1; }}\n"), &[]);
        assert!(error.starts_with("type.proto:2:13: ") && error.contains("Nothing"), "{error}");
        let error = load("import.proto", &format!("{head}import \"nothing.proto\";\n"), &[]);
        assert!(error.starts_with("import.proto:2:1: ") && error.contains("nothing.proto"), "{error}");

        let includes = [folder.path().to_owned()];
        let error = Schema::load(&["nothing.proto".into()], &includes, "M").unwrap_err().to_string();
        assert_eq!(error, format!("nothing.proto: there is no such file, nor in {}", includes[0].display()));
        let error = Schema::load(&["nothing.proto".into()], &[], "M").unwrap_err().to_string();
        assert_eq!(error, "nothing.proto: there is no such file");
    }

    #[test]
    fn an_unknown_type_is_told_what_there_is() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gtfs-realtime/gtfs-realtime.proto");
        let error = Schema::load(&[file.into()], &[], "transit_realtime.Feed").unwrap_err().to_string();
        assert!(error.contains("`transit_realtime.Feed`"), "{error}");
        assert!(error.contains("transit_realtime.FeedMessage"), "{error}");
    }
}
